"""How a run stands: from its files, its lock, and a Slurm that answers, refuses or is silent."""

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.cluster import status
from pretrain.cluster.blame import first_words
from pretrain.cluster.status import StatusError
from pretrain.wrong_input import INPUT_ERRORS


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 40 steps that stands at 20; its Slurm has nothing in line."""
    slurm(tmp_path, monkeypatch, "exit 0")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("steps: 40\n")
    return folder


def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """A squeue that does this."""
    place = tmp_path / "bin"
    place.mkdir(exist_ok=True)
    (place / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (place / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")


def attempt(run: Path, restart: int, outcome: str | None = None, **values: Any) -> None:
    """The lines of one incarnation of job 17; without an outcome it has not ended."""
    key = {"job": "17", "restart": restart, "nodes": "node[1-2]", "gpus": 4}
    lines: list[dict[str, Any]] = [{"event": "begin", "time": 100.0 * restart, **key}]
    if outcome is not None:
        end = {"event": "end", "time": 100.0 * restart + 60, "outcome": outcome}
        lines.append({**end, **key, **values})
    with (run / "attempts.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def life(run: Path, step: int, *, ended: bool = False, job: str | None = "17") -> None:
    begin = {"event": "begin", "time": 20.0, "step": 0, "world": 4, "job": job, "restart": 0}
    last = {"event": "end" if ended else "steps", "time": 50.0, "step": step, "steps": step}
    spent = {"seconds": {"step": 30.0, "data": 0.0, "save": 0.0, "other": 0.0}}
    lines = [begin | {"started": 10.0}, last | spent]
    (run / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def metrics(run: Path, losses: list[float | None]) -> None:
    times = [9.0] + [0.5] * (len(losses) - 1)
    lines = [
        {"step": n, "loss": loss, "step_time": time, "images_per_s": 8 / time}
        for n, (loss, time) in enumerate(zip(losses, times, strict=True), start=1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StatusError, match="holds no run; give a run directory"):
        status.of(tmp_path)
    with pytest.raises(StatusError, match="is no directory"):
        status.rows([tmp_path / "none"])
    assert StatusError in INPUT_ERRORS


def test_a_run_that_nobody_started(run: Path) -> None:
    found = status.of(run)
    assert (found["state"], found["step"], found["steps"]) == ("never started", 0, 40)
    assert (found["restarts"], found["job"], found["last_checkpoint"]) == (0, None, None)
    assert (found["final_loss"], found["images_per_s"], found["last_error"]) == (None, None, None)
    assert found["goodput"]["allocated_s"] == 0


def test_a_trainer_that_holds_the_directory_is_running(run: Path) -> None:
    attempt(run, 0)
    life(run, 20)
    metrics(run, [3.0] * 20)
    with (run / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = status.of(run)
    assert (found["state"], found["job"], found["nodes"]) == ("running", "17", "node[1-2]")
    assert found["images_per_s"] == 16.0
    assert found["steps_per_s"] == 2.0
    assert found["eta_s"] == 10.0
    assert found["eta"].startswith("20")
    assert found["goodput"]["useful_s"] == 30
    assert found["goodput"]["unaccounted_s"] > 1e6  # the file's clock stands near 1970
    after = status.of(run)
    assert (after["state"], after["eta_s"]) == ("lost", None)


@pytest.mark.parametrize(
    ("answer", "state", "why"),
    [
        ("echo '17|RUNNING|None'", "running", None),
        ("echo '17|COMPLETING|None'", "running", None),
        ("echo '17|PENDING|BeginTime'", "pending", "BeginTime"),
        ("echo '99|RUNNING|None'", "lost", "Slurm has it no more"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "lost", "no more"),
        ("printf 'a\\nsqueue: error: b\\n' >&2; exit 1", "unknown", "of Slurm: squeue: error: b"),
        ("exec tail -f /dev/null", "unknown", "squeue did not answer in 0 s"),
    ],
)
def test_slurm_is_asked_where_the_files_do_not_say(
    answer: str,
    state: str,
    why: str | None,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slurm(tmp_path, monkeypatch, answer)
    if answer.startswith("exec"):
        monkeypatch.setattr(status, "LIMIT", 0.2)
    attempt(run, 0)
    life(run, 20)
    found = status.of(run)
    assert found["state"] == state
    assert why is None or why in found["why"]
    assert (found["slurm"] is not None) == (state == "unknown")
    assert found["goodput"]["lost_s"] == (30 if state in ("lost", "pending") else 0)


@pytest.mark.parametrize("outcome", ["stopped", "crashed", "terminated", "unhealthy", "refused"])
def test_an_attempt_says_itself_how_it_ended(outcome: str, run: Path) -> None:
    attempt(run, 0, "crashed", why="a rank failed")
    attempt(run, 1, outcome, why="because")
    found = status.of(run)
    assert (found["state"], found["why"], found["restarts"]) == (outcome, "because", 1)
    (run / "done").write_text("40\n")
    assert status.of(run)["state"] == "done"


def test_a_stopped_job_in_line_is_pending_and_without_slurm_known_too(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(tmp_path, monkeypatch, "echo '17|REQUEUED|None'")
    attempt(run, 0, "stopped")
    assert status.of(run)["state"] == "pending"
    monkeypatch.setenv("PATH", str(tmp_path / "run"))
    found = status.of(run)
    assert (found["state"], found["slurm"]) == ("stopped", "there is no squeue on this machine")


@pytest.mark.parametrize(("ended", "state", "lost"), [(True, "stopped", 0), (False, "crashed", 30)])
def test_a_run_without_slurm(ended: bool, state: str, lost: int, run: Path) -> None:
    life(run, 20, ended=ended, job=None)
    found = status.of(run)
    assert (found["state"], found["step"], found["slurm"]) == (state, 20, None)
    assert found["goodput"]["lost_s"] == lost
    assert found["goodput"]["start_s"] == 10


def test_the_last_checkpoint_is_the_newest_whole_one(run: Path) -> None:
    for step in (10, 20, 30):
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    for step in (10, 20):
        (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").touch()
    life(run, 24, job=None)
    found = status.of(run)
    assert found["last_checkpoint"]["step"] == 20
    assert found["last_checkpoint"]["when"][:2] == "20"
    assert found["goodput"]["lost_s"] == pytest.approx(30 * 4 / 24)


def test_runs_are_listed_by_their_final_loss(run: Path, tmp_path: Path) -> None:
    losses = {"b": [9.0] * 18 + [2.0, 3.0], "a": [1.0] * 18 + [4.0, 4.0], "n": [1.0] * 19 + [None]}
    for name, values in losses.items():
        folder = tmp_path / name
        folder.mkdir()
        metrics(folder, values)
    found = status.rows([tmp_path / name for name in ("a", "n", "b")] + [run])
    assert [Path(row["run"]).name for row in found] == ["b", "a", "n", "run"]
    assert [row["loss"] for row in found] == [2.5, 4.0, None, None]
    assert list(found[0]) == [
        "run", "state", "step", "steps", "loss", "images_per_s", "restarts", "last_checkpoint"
    ]  # fmt: skip


TRACEBACK = """[rank 2] Traceback (most recent call last):
[rank 2]   File "x.py", line 3, in f
[rank 2]     raise KeyError("a")
[rank 2] KeyError: 'a'
[rank 2]
[rank 2] The above exception was the direct cause of the following exception:
[rank 2]
[rank 2] Traceback (most recent call last):
[rank 2]   File "x.py", line 5, in g
[rank 2] ValueError: no such label: 7
rank 2 ended
"""
BROKEN = """Traceback (most recent call last):
  File "y.py", line 1, in h
RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer
rank 0 ended because rank 2 failed at x.py:5 in g: ValueError: no such label: 7
"""
LOST = """[rank0]: Traceback (most recent call last):
[rank0]:   File "y.py", line 1, in h
[rank0]: torch.distributed.DistNetworkError: [gloo] Broken pipe
"""
CHAIN = """[rank1]: Traceback (most recent call last):
[rank1]:   File "y.py", line 1, in h
[rank1]: ValueError: no such label: 8
[rank1]: of 10

[rank1]: During handling of the above exception, another exception occurred:

[rank1]: Traceback (most recent call last):
[rank1]:   File "y.py", line 2, in h
[rank1]: RuntimeError: [gloo/transport] Connection closed by peer
"""
AFTER_LOST = """Traceback (most recent call last):
  File "y.py", line 1, in h
RuntimeError: [gloo/transport] Connection closed by peer

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "y.py", line 2, in h
AttributeError: no loader
"""
AGENT = """Traceback (most recent call last):
  File "z.py", line 1, in main
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
REMOTE = """[rank 3] Traceback (most recent call last):
[rank 3]   File "y.py", line 1, in h
[rank 3] DataError: x: Connection reset by peer
"""
OOM = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=17.0"
CANCELLED = "slurmstepd: error: *** STEP 17.0 ON node1 CANCELLED AT 2026-11-21T10:00:00 ***"
KILLED = "rank 1 ended or was killed without a word: rank 1 was last at train.py:120 in train"


@pytest.mark.parametrize(
    ("logs", "said"),
    [
        ([BROKEN, "step 1\n", TRACEBACK], "rank 2: ValueError: no such label: 7"),
        ([BROKEN], "rank 0 ended because rank 2 failed at x.py:5 in g: ValueError: no such la"),
        ([f"rank 0 ended at a.py: gloo\n{KILLED}\n", BROKEN], KILLED),
        (["step 9\npretrain: steps=x must be a whole number\n"], "pretrain: steps=x must be a w"),
        (["Traceback (most recent call last):\n  File\nOSError: full\n", KILLED], "OSError: full"),
        (["step 1\nrank 0 was ended by SIGKILL\n"], "rank 0 was ended by SIGKILL"),
        (["all is well\n"], None),
        ([LOST, CHAIN], "rank 1: ValueError: no such label: 8"),
        ([LOST.replace("[gloo", "["), AGENT, KILLED], KILLED),
        ([AFTER_LOST, "rank 0 was ended by SIGTERM", f"x\n{OOM}"], OOM),
        (["Fatal Python error: Aborted\n", AFTER_LOST, KILLED], KILLED),
        (["Fatal Python error: Aborted\n", AFTER_LOST], "Fatal Python error: Aborted"),
        ([f"{CANCELLED}\nrank 1 was ended by SIGTERM\n", AGENT], CANCELLED),
        (
            [REMOTE, "Traceback (most recent call last)\n  F\nKeyError: 1"],
            "rank 3: DataError: x: Con",
        ),
    ],
)
def test_a_cause_goes_before_its_consequences(
    logs: list[str], said: str | None, tmp_path: Path
) -> None:
    paths = [tmp_path / f"17.0-train-rank{rank}.log" for rank in range(len(logs))]
    for path, text in zip(paths, logs, strict=True):
        path.write_text(text)
    found = first_words(paths)
    assert (found is None) == (said is None)
    assert said is None or (found is not None and found[0].startswith(said))


def test_of_a_long_log_both_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "17.0-train-rank0.log"
    for begin, end in (("", KILLED), (KILLED, "")):
        path.write_text(f"{begin}\n{'step 1' * 400_000}\n{end}\n")
        assert first_words([path]) == (KILLED, path)


def test_the_error_is_that_of_the_newest_attempt_that_failed(run: Path) -> None:
    (run / "logs").mkdir()
    for restart, text in enumerate(("pretrain: a\n", "pretrain: b\n", "pretrain: c\n")):
        (run / "logs" / f"17.{restart}-train-rank0.log").write_text(text)
    attempt(run, 0, "crashed")
    attempt(run, 1, "crashed")
    attempt(run, 2, "stopped")
    error = status.of(run)["last_error"]
    assert (error["attempt"], error["text"]) == ("17.1", "pretrain: b")
    assert error["log"].endswith("17.1-train-rank0.log")
    attempt(run, 3, "unhealthy", why="node2 failed the health check")
    assert status.of(run)["last_error"]["text"] == "node2 failed the health check"
