"""`sbatch slurm/udit_xl_moe.sh` on a real Slurm: run, stopped, killed, and back with the same bits.

2 nodes × 2 processes throughout; the reference is one job that nothing happened to.
"""

import json
import signal
from typing import Any

import pytest

from pretrain import timeline
from pretrain.cluster import status
from tests.slurm.jobs import STEPS, Jobs, assert_same_end

SHARES = ("useful", "start", "data", "save", "lost", "restart", "other", "unaccounted")


def test_a_job_trains_saves_and_draws(undisturbed: Jobs) -> None:
    run = undisturbed.run_dir
    assert (run / "done").read_text() == f"{STEPS}\n"
    saved = {f.name for f in (run / "checkpoints").iterdir()}
    assert saved == {f"step_{step:08d}" for step in (4, 8, STEPS)}
    assert (run / "samples" / f"step_{STEPS:08d}.png").stat().st_size > 1000
    (attempt,) = undisturbed.attempts()
    assert (attempt["outcome"], attempt["from"], attempt["to"]) == ("done", -1, STEPS)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world"] == 4
    assert len(list((run / "logs").glob("*-train-rank?.log"))) == 4


def test_stopped_then_killed_it_comes_back_and_ends_the_same(jobs: Jobs, undisturbed: Jobs) -> None:
    number = jobs.train()
    jobs.until_step(3)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", number)
    jobs.until_attempt(1, number)
    jobs.until_step(9)
    jobs.send(signal.SIGKILL, ranks=(3,))
    assert_same_end(jobs, number, undisturbed)
    ends = jobs.attempts()
    assert [end["outcome"] for end in ends] == ["stopped", "crashed", "done"]
    assert not (jobs.run_dir / "stop").exists()
    (asked,) = [
        line
        for line in timeline.objects(jobs.run_dir / timeline.TIMELINE)
        if line["event"] == "asked"
    ]
    assert ends[0]["to"] - asked["step"] <= 2
    assert_adds_up(status.of(jobs.run_dir)["goodput"])


def assert_adds_up(goodput: dict[str, float]) -> None:
    """Every second that was allocated is in one of the shares, and nearly all have a name."""
    shares = [goodput[f"{name}_s"] for name in SHARES]
    assert goodput["allocated_s"] == pytest.approx(sum(shares), abs=1e-3)
    assert abs(goodput["unaccounted_s"]) < 1
    share = goodput["useful_s"] / goodput["allocated_s"]
    assert goodput["goodput"] == pytest.approx(share, abs=1e-4)  # seconds are shown to 1 ms
    assert min(goodput["start_s"], goodput["restart_s"], goodput["useful_s"]) > 0


@pytest.mark.slow
def test_the_time_limit(jobs: Jobs, undisturbed: Jobs) -> None:
    """Two minutes. Slurm looks every half minute, so the ranks are held until it has."""
    number = jobs.train(options=("--time=2", "--signal=B:USR1@45"))
    jobs.until_step(3)
    jobs.send(signal.SIGSTOP)
    jobs.cluster.until("USR1", lambda: "USR1: the ranks" in jobs.log(number), 90)
    jobs.send(signal.SIGCONT)
    assert_same_end(jobs, number, undisturbed)
    first = jobs.attempts()[0]
    assert first["outcome"] == "stopped"
    assert 3 <= first["to"] < STEPS


@pytest.mark.slow
def test_a_time_limit_that_nobody_announced(jobs: Jobs) -> None:
    """Slurm ends the ranks with TERM: they save, and the job comes back."""
    options = ("--time=1", "--signal=B:CONT@1")
    words = ("steps=40000", "log.every=10", "checkpoint.every=40000")
    number = jobs.train(*words, options=options)
    jobs.until_attempt(1, number, limit=240)
    assert jobs.attempts()[0]["outcome"] == "stopped"
    assert jobs.attempts("begin")[1]["from"] > 0, jobs.log(number) + jobs.ranks()


@pytest.mark.slow
def test_requeued_by_hand(jobs: Jobs, undisturbed: Jobs) -> None:
    number = jobs.train()
    jobs.until_step(6)
    jobs.cluster.run("scontrol", "requeue", number)
    assert_same_end(jobs, number, undisturbed)
    assert len(jobs.attempts()) == 2
    first, again = map(jobs.start_seconds, jobs.attempts("begin"))
    # 30 s is the promise; where other programs hold the cores, the first life tells how much.
    assert again < max(30, 1.5 * first)


@pytest.mark.slow
def test_a_node_is_lost(jobs: Jobs, undisturbed: Jobs) -> None:
    """The power of a node is cut in the middle; the spare takes its place."""
    number = jobs.train()
    jobs.until_step(6)
    jobs.cluster.fail(2)
    try:
        assert_same_end(jobs, number, undisturbed)
        assert jobs.nodes() == {"node1", "node3"}
    finally:
        jobs.cluster.heal(2)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [True, False], ids=["USR1", "TERM-to-the-ranks-alone"])
def test_preempted(asked: bool, jobs: Jobs, undisturbed: Jobs) -> None:
    jobs.cluster.ask_before_preemption(asked)
    number = jobs.train(options=("--partition=preempt",))
    jobs.until_step(3)
    other = jobs.cluster.run(
        *("sbatch", "--parsable", "--nodes=3", "--exclusive", "--output=/dev/null"),
        *("--wrap", "true"),
    ).strip()
    assert_same_end(jobs, number, undisturbed)
    assert jobs.wait(other) == "COMPLETED"
    first, _ = jobs.attempts()
    assert first["outcome"] == "stopped"
    assert first["why"].startswith("Slurm asked" if asked else "preempted")


@pytest.mark.slow
def test_cancelled_it_saves_and_stays_away(jobs: Jobs, undisturbed: Jobs) -> None:
    number = jobs.train()
    jobs.until_step(5)
    jobs.cluster.run("scancel", number)
    assert jobs.wait(number) == "CANCELLED"
    jobs.cluster.until("the ranks are gone", lambda: jobs.cluster.idle() == 3)
    assert int((jobs.run_dir / "latest").read_text()) >= 5
    again = jobs.train()
    assert_same_end(jobs, again, undisturbed)


@pytest.mark.slow
def test_a_prolog_that_fails(jobs: Jobs, undisturbed: Jobs) -> None:
    """Slurm drains the node and puts the job on the spare."""
    sick = jobs.cluster.dir / "etc" / "sick-node2"
    sick.touch()
    try:
        number = jobs.train()
        assert_same_end(jobs, number, undisturbed)
        assert "Prolog error" in jobs.cluster.run("scontrol", "show", "node", "node2")
        assert "node2" not in jobs.nodes()
    finally:
        sick.unlink()
        jobs.cluster.run("scontrol", "update", "NodeName=node2", "State=resume", check=False)


def test_a_person_who_asks_it_to_stop_is_obeyed(jobs: Jobs) -> None:
    """A file `stop` is no request of Slurm's: the job ends, also before it has begun."""
    jobs.run_dir.mkdir(parents=True)
    (jobs.run_dir / "stop").touch()
    number = jobs.train("mesh.ep=1", options=("--nodes=1",), GPUS_PER_NODE="1")
    assert jobs.wait(number) == "COMPLETED"
    assert [a["outcome"] for a in jobs.attempts()] == ["stopped"]
    assert not (jobs.run_dir / "done").exists()


def test_a_crash_loop_ends(jobs: Jobs) -> None:
    """An interpreter that fails at once: three lives, then it is said why there is no fourth."""
    number = jobs.train(PRETRAIN_PYTHON="/bin/false", MAX_CRASHES="3", HEALTH="off")
    assert jobs.wait(number) == "FAILED"
    assert [a["outcome"] for a in jobs.attempts()] == ["crashed"] * 3
    assert "gives up: it failed 3 times" in jobs.log(number)


def test_wrong_input_is_not_requeued(jobs: Jobs) -> None:
    number = jobs.train("optim.lrr=1", GPUS_PER_NODE="1", options=("--nodes=1",))
    assert jobs.wait(number) == "FAILED"
    assert jobs.cluster.job(number)["ExitCode"] == "2:0"
    assert "optim.lrr" in jobs.log(number)
    assert [a["outcome"] for a in jobs.attempts()] == ["refused"]


def test_a_sick_node_is_named_and_left_out(jobs: Jobs, digits: Any) -> None:
    """One node does not see the data set."""
    if not jobs.cluster.isolated:
        pytest.skip("nodes share one view of the file system here: no namespaces allowed")
    jobs.cluster.inside(2, "mount", "-t", "tmpfs", "none", str(digits))
    try:
        number = jobs.train(GPUS_PER_NODE="1")
        assert jobs.wait(number) == "FAILED"
    finally:
        jobs.cluster.inside(2, "umount", str(digits))
    text = jobs.log(number)
    assert "node2: health check 'data' failed" in text
    assert "node1: health check" not in text
    assert "sbatch --exclude=node2 --nodes=2" in text
    assert "udit_xl_moe.sh" in text
    assert [a["outcome"] for a in jobs.attempts()] == ["unhealthy"]
    (line,) = (jobs.folder / "site" / "bad_nodes.jsonl").read_text().splitlines()
    assert json.loads(line)["node"] == "node2"
