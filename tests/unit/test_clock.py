"""Spans of time: each moment belongs to the innermost span, and all add up."""

import json
import time
from pathlib import Path

import pytest
import torch

from parallel import clock
from pretrain import cli
from pretrain.config import ConfigError
from pretrain.meter import KINDS
from pretrain.profiling import ProfileConfig
from pretrain.shortage import ShortageError, explained
from tests import ranks, tiny


def test_inner_spans_are_not_their_outer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timer = clock.start(torch.device("cpu"))

    @clock.spends("communication")
    def waits() -> str:
        now[0] += 5.0
        return "done"

    now[0] += 1.0
    with clock.spending("forward"):
        now[0] += 2.0
        assert waits() == "done"
        now[0] += 3.0
    assert timer.read() == {"other": 1.0, "forward": 5.0, "communication": 5.0}
    now[0] += 1.0
    assert timer.read() == {"other": 1.0}


def test_a_span_ends_with_an_error() -> None:
    timer = clock.start(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), clock.spending("forward"):
        _ = 1 / 0
    assert timer._kinds == [clock.OTHER]


def test_a_run_tells_where_its_time_went_and_leaves_a_trace(tmp_path: Path, digits: Path) -> None:
    path = tiny.write(tmp_path, "dit", digits, steps=6, checkpoint__every=3, log__every=2)
    words = ("train", str(path), f"run_dir={tmp_path / 'run'}", "--profile", "3-4")
    ranks.run(ranks.pretrain, 2, *words, log=tmp_path / "log")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [2, 4, 6]
    for record in records:
        parts = {kind: record[f"time.{kind}"] for kind in KINDS}
        assert all(seconds >= 0 for seconds in parts.values())
        assert min(parts[kind] for kind in ("forward", "backward", "optimizer")) > 0
        assert parts["communication"] > 0  # of the two ranks' gathers
    assert records[1]["time.checkpoint"] > 0  # the save of step 3
    told = sum(records[1][f"time.{kind}"] for kind in KINDS)
    assert told == pytest.approx(records[1]["step_time"], rel=0.02)
    trace = tmp_path / "run" / "profile" / "steps_3-4.json.gz"
    assert trace.stat().st_size > 1000
    assert list(trace.parent.iterdir()) == [trace]  # rank 0 alone writes


@pytest.mark.parametrize("words", ["x", "3-", "-4", "3-4-5"])
def test_steps_to_trace_are_checked(words: str) -> None:
    with pytest.raises(ConfigError, match=f"--profile {words}: expected a step"):
        cli._traced(words)


def test_a_trace_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match=r"profile.first=4, profile.last=3"):
        ProfileConfig(first=4, last=3)


def test_out_of_memory_says_what_would_fit(tmp_path: Path) -> None:
    with (
        pytest.raises(ShortageError, match=r"rank 3 ran out of memory: tried 2 GB.* accum=4 fits"),
        explained(tmp_path, 3, lambda: "accum=4 fits"),
    ):
        raise torch.OutOfMemoryError("tried 2 GB\nand more lines")
