"""How often a run saves by itself: the formula, one answer on all ranks, and after a restart."""

import json
import math
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel import launch
from pretrain import config
from pretrain import interval as intervals
from pretrain.checkpoint import Checkpoint
from pretrain.interval import FIRST, Interval, best
from pretrain.manifest import CheckpointConfig, stored
from tests import ranks, tiny

FACTS = dict.fromkeys(("model", "objective", "data", "latents", "config"), {})


def test_the_interval_loses_least_to_saves_and_failures() -> None:
    blocked, step, mtbf = 4.0, 0.5, 500 * 3600.0
    steps = best(blocked, 1.0, step, mtbf)
    assert steps == round(math.sqrt(2 * blocked * mtbf) / step)

    def lost(n: float) -> float:
        return blocked / (n * step) + n * step / (2 * mtbf)

    assert lost(steps) < min(lost(0.9 * steps), lost(1.1 * steps))


def test_the_interval_is_at_least_twice_the_way_to_the_disk() -> None:
    assert best(1e-6, 300.0, 2.0, 3600.0) == 300
    assert best(0.0, 0.0, 2.0, 3600.0) == 1


def test_more_nodes_save_more_often() -> None:
    def proposed(nodes: int, **settings: float) -> int:
        return Interval(CheckpointConfig(**settings), nodes).proposal(1.0, 1.0, 1.0)  # type: ignore[arg-type]

    assert proposed(1) == round(math.sqrt(2 * 1000 * 3600))
    assert proposed(4) == round(proposed(1) / 2)
    assert proposed(1, mtbf_hours=250.0) == proposed(4)


def test_a_given_number_is_kept_to_whatever_is_measured() -> None:
    interval = Interval(CheckpointConfig(every=30, keep_every=20), 1)
    assert [step for step in range(1, 100) if interval.due(step)] == [30, 60, 90]
    interval.restored(10, 7)
    interval.saved(33)
    assert interval.proposal(1.0, 1.0, 1.0) == 30
    assert interval.due(60)
    assert not interval.due(63)


def test_steps_count_from_the_last_save_and_kept_ones_are_saved_too() -> None:
    interval = Interval(CheckpointConfig(keep_every=70), 1)
    saved = []
    for step in range(1, 400):
        if interval.due(step):
            saved.append(step)
            interval.saved(step)
    assert saved == [70, 140, 210, 280, 350]
    interval = Interval(CheckpointConfig(), 1)
    assert interval.due(FIRST)
    assert interval.due(FIRST + 3)  # as after skipped steps, which are not saved
    interval.saved(FIRST + 3)
    assert not interval.due(2 * FIRST + 2)
    assert interval.due(2 * FIRST + 3)


def test_a_small_change_is_not_worth_a_word() -> None:
    interval = Interval(CheckpointConfig(), 1)
    steps = interval.proposal(1.0, 1.0, 10.0)
    assert "268 steps apart from here on, 100 before" in str(interval.adopt(steps))
    assert interval.proposal(1.0, 1.0, 10.0 * 1.15) == steps
    assert interval.adopt(steps) is None
    assert interval.proposal(1.0, 1.0, 10.0 * 1.3) != steps


def test_a_busy_moment_is_no_measure() -> None:
    interval = Interval(CheckpointConfig(), 1)
    told = [interval.proposal(blocked, 1.0, 1.0) for blocked in (1.0, 1.0, 900.0, 1.0)]
    assert len(set(told)) == 1


def test_ephemeral_saves_want_a_number() -> None:
    with pytest.raises(config.ConfigError, match=r"ephemeral=5 lies between .* set every to a num"):
        config.part(CheckpointConfig, {"ephemeral": 5})
    with pytest.raises(config.ConfigError, match=r"^every: 'often' came; set it to a whole number"):
        config.part(CheckpointConfig, {"every": "often"})


class Held:
    """As much of a TrainState as a checkpoint looks at."""

    def __init__(self) -> None:
        self.step = 0
        self.values = {"model.w": torch.zeros(3)}

    def tensors(self) -> dict[str, Tensor]:
        return self.values

    def absent(self, stored: object) -> set[str]:
        return set()

    def scalars(self) -> dict[str, int]:
        return {"step": self.step}

    def loaded(self, scalars: dict[str, int]) -> None:
        self.step = scalars["step"]


def trains(run: str, told: str, steps: int) -> None:
    """Steps and saves as the page does; the clock of each rank goes at its own pace."""
    place = launch.Place.here()
    launch.join(place, threads=1, timeout=timedelta(seconds=60))
    clock = [0.0]

    def ticking() -> float:
        clock[0] += 0.01 * (1 + 3 * place.rank)
        return clock[0]

    intervals.time.perf_counter = ticking  # type: ignore[assignment]
    said: list[str] = []
    held, cfg = Held(), CheckpointConfig(mtbf_hours=1.0, keep=99)
    saver = Checkpoint(cfg, Path(run), FACTS, said.append, nodes=2)
    saver.restore(held)  # type: ignore[arg-type]
    saved, first = [], saver._interval.steps
    while held.step < steps:
        held.step += 1
        clock[0] += 1.0 + place.rank
        if saver.due(held.step):
            saver.save(held)  # type: ignore[arg-type]
            saved.append(held.step)
            assert saver._thread is not None
            saver._thread.join()  # or a hundred steps of this clock would pass meanwhile
    saver.wait()
    out = {"saved": saved, "first": first, "last": saver._interval.steps, "said": said}
    Path(told, f"{os.environ['RANK']}.json").write_text(json.dumps(out))
    launch.leave()


def test_two_ranks_agree_and_a_restart_goes_on_with_it(tmp_path: Path) -> None:
    ranks.run(trains, 2, str(tmp_path / "run"), str(tmp_path), 300)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[0]["saved"] == told[1]["saved"]
    assert told[0]["saved"][:2] == [FIRST, 2 * FIRST]
    assert told[0]["first"] == FIRST
    assert told[0]["last"] == told[1]["last"] < FIRST / 4
    assert any("steps apart from here on, 100 before" in words for words in told[0]["said"])
    apart = told[0]["last"]
    manifest = json.loads((stored(tmp_path / "run")[-1] / "manifest.json").read_text())
    assert manifest["interval"] == apart
    newest = manifest["state"]["step"]
    ranks.run(trains, 1, str(tmp_path / "run"), str(tmp_path), newest + apart)
    again = json.loads((tmp_path / "0.json").read_text())
    assert again["first"] == apart
    assert again["saved"] == [newest + apart]


def test_the_page_saves_by_itself_and_says_so(digits: Path, tmp_path: Path) -> None:
    changes = {"checkpoint__every": "auto", "checkpoint__mtbf_hours": 1e-6, "steps": 104}
    path = tiny.write(tmp_path, "dit", digits, log__every=50, **changes)
    ranks.train(path, tmp_path / "run", "checkpoint.keep_every=90")
    steps = [int(folder.name[5:]) for folder in stored(tmp_path / "run")]
    assert steps[0] == 90
    assert steps[-1] == 104
