"""A run that is killed, resumed and asked to stop has accounted for all of its time."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pretrain.cluster import status
from pretrain.timeline import read
from tests import ranks, tiny

PARTS = ("useful", "start", "data", "save", "lost", "restart", "other", "unaccounted")


def at_step(number: int, what: str, *words: str) -> None:
    """Trains; in the middle of this step of its life the rank is killed, or asked to stop."""
    from pretrain.engine import Engine

    honest, seen = Engine.step, [0]

    def step(self: Engine, *args: object, **named: object) -> object:
        seen[0] += 1
        if seen[0] == number and what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if seen[0] == number:
            Path(what).touch()
        return honest(self, *args, **named)  # type: ignore[arg-type]

    Engine.step = step  # type: ignore[assignment,method-assign]
    ranks.pretrain(*words)


def told(run: Path) -> dict[str, Any]:
    found = status.of(run)
    parts = found["goodput"]
    assert sum(parts[f"{part}_s"] for part in PARTS) == pytest.approx(parts["allocated_s"])
    return found


def test_the_time_of_a_killed_and_resumed_run_adds_up(digits: Path, tmp_path: Path) -> None:
    changes = {"steps": 30, "checkpoint__every": 4, "log__every": 2}
    config = tiny.write(tmp_path, "dit", digits, **changes)
    run, stop = tmp_path / "run", tmp_path / "run" / "stop"
    run.mkdir()
    words = ("train", str(config), f"run_dir={run}")
    assert ranks.wait(ranks.start(at_step, 1, 15, "kill", *words, log=run / "log")) == [-9]
    found = told(run)
    assert (found["state"], found["step"], found["goodput"]["attempts"]) == ("crashed", 14, 1)

    ranks.run(at_step, 1, 5, str(stop), *words, log=run / "log")
    found = told(run)
    assert (found["state"], found["restarts"], found["last_error"]) == ("stopped", 1, None)
    first, second = read(run)
    assert second.ended
    assert second.asked is not None
    assert second.lines[-1]["step"] == second.asked["step"] + 2 == found["last_checkpoint"]["step"]
    assert second.lines[0]["step"] == second.begin["step"] + 1  # told at once

    ranks.train(config, run)
    found = told(run)
    assert (found["state"], found["step"], found["goodput"]["attempts"]) == ("done", 30, 3)
    parts, lives = found["goodput"], read(run)
    thrown = [line for line in first.lines if line["step"] > second.begin["step"]]
    lost = sum(sum(line["seconds"].values()) for line in thrown)
    assert thrown
    assert parts["lost_s"] == pytest.approx(lost, abs=1e-3)
    wall = sum(life.last - life.begin["started"] for life in lives)
    assert parts["allocated_s"] == pytest.approx(wall, abs=0.01)
    starts = [life.begin["time"] - life.begin["started"] for life in lives]
    assert parts["start_s"] == pytest.approx(starts[0], abs=1e-3)
    assert parts["restart_s"] == pytest.approx(starts[1] + starts[2], abs=1e-3)
    assert abs(parts["unaccounted_s"]) < 0.02 * parts["allocated_s"]
    assert 0 < parts["goodput"] < 1
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 30
