"""A search over real runs: killed in the middle and started again, it is the one that was not."""

import json
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Mapping, Sequence
from functools import partialmethod
from pathlib import Path

import pytest

from pretrain.state import TrainState
from tests import ranks, tiny


class Forked:
    """A trial as a fork of the search; a new interpreter would need seconds to import torch."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self._process = mp.get_context("fork").Process(target=_trial, args=(words, env, log))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, sig: int, /) -> None:
        os.kill(self._process.pid or 0, sig)


def _trial(words: Sequence[str], env: Mapping[str, str], log: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(env)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    ranks.pretrain(*words)


def search(*words: str) -> None:
    """`pretrain tune`, its trials forked."""
    from pretrain.tune import Sweep

    Sweep.run = partialmethod(Sweep.run, start=Forked)  # type: ignore[method-assign]
    ranks.pretrain("tune", *words)


def held_search(out: str, *words: str) -> None:
    """The same; once a trial is done, the others stop for ever where they have saved."""
    from pretrain.checkpoint import Checkpoint

    save = Checkpoint.save

    def then_stop(self: Checkpoint, state: TrainState) -> None:
        save(self, state)
        if any(Path(out).glob("*/done")):
            self.wait()
            Path(out, "held").touch()
            signal.pause()

    Checkpoint.save = then_stop  # type: ignore[method-assign]
    search(*words)


def lines(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def test_a_search_that_is_killed_goes_on_and_repeats_no_finished_trial(
    digits: Path, tmp_path: Path
) -> None:
    changes = {"model__width": 16, "model__num_heads": 1, "checkpoint__every": 3, "steps": 15}
    config, out, log = tiny.write(tmp_path, "dit", digits, **changes), tmp_path / "out", tmp_path
    words = (str(config), "--param", "optim.lr=2^-9,2^-7,1e9", "--widths", "16,32")
    words += ("--jobs", "2", "--out", str(out), "parametrisation=mup", "model.mup.base_width=16")

    started = ranks.start(held_search, 1, str(out), *words, log=log / "killed.log")
    while not (out / "held").exists():
        assert started[0].is_alive(), (log / "killed.log").read_text()
        time.sleep(0.005)
    started[0].kill()
    assert ranks.wait(started) == [-9]
    finished = {run.parent.name: run.parent for run in out.glob("*/done")}
    assert 1 <= len(finished) < 6
    times = {name: (run / "metrics.jsonl").stat().st_mtime_ns for name, run in finished.items()}

    ranks.run(search, 1, *words, log=log / "again.log")
    said = (log / "again.log").read_text()
    assert not [name for name in finished if f"{name}: " in said]
    for name, run in finished.items():
        assert (run / "metrics.jsonl").stat().st_mtime_ns == times[name]
    begun = {r.name for r in out.glob("w*") if "restored step" in (r / "log.txt").read_text()}
    assert begun
    assert begun.isdisjoint(finished)
    found = json.loads((out / "tune.json").read_text())
    assert (found["complete"], found["counts"]) == (True, {"done": 4, "diverged": 2})
    for row in found["trials"]:
        records = lines(out / row["name"])
        assert [record["step"] for record in records] == list(range(1, 16))
        wild = row["values"]["optim.lr"] == 1e9
        assert row["state"] == ("diverged" if wild else "done")
        assert wild or row["loss"] == sum(record["loss"] for record in records[-3:]) / 3
    cells = {row["optim.lr"]: (row["width 16"], row["width 32"]) for row in found["losses"]}
    assert cells.keys() == {2**-9, 2**-7, 1_000_000_000}
    assert cells[1_000_000_000] == ("diverged", "diverged")
    assert [row["values"] for row in found["verdict"]["best"]] == [{"optim.lr": 2**-7}] * 2
    assert found["verdict"]["moves"] == 0
    assert (out / "tune.png").is_file()


@pytest.mark.slow
def test_a_trial_is_a_process_of_its_own_that_a_stop_saves(digits: Path, tmp_path: Path) -> None:
    """With the interpreter that people get, asked to stop in the middle of a trial."""
    config, out = tiny.write(tmp_path, "dit", digits, steps=400), tmp_path / "out"
    words = (str(config), "--param", "optim.lr=2^-9", "--out", str(out))
    started = ranks.start(ranks.pretrain, 1, "tune", *words, log=tmp_path / "stopped.log")
    run = out / "w32-lr0.00195312-s0"
    while len(lines(run)) < 5:
        assert started[0].is_alive(), (tmp_path / "stopped.log").read_text()
        time.sleep(0.05)
    started[0].terminate()
    assert ranks.wait(started) == [1]
    assert not (run / "done").exists()
    saved = int((run / "latest").read_text())
    assert saved == lines(run)[-1]["step"]
    assert json.loads((out / "tune.json").read_text())["counts"] == {"unfinished": 1}
    ranks.run(ranks.pretrain, 1, "tune", *words, log=tmp_path / "again.log")
    assert f"restored step {saved}" in (run / "log.txt").read_text()
    assert json.loads((out / "tune.json").read_text())["counts"] == {"done": 1}
