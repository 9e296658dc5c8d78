"""Where wall time went: what a life writes down, and what the histories of lives add up to."""

import json
from pathlib import Path
from typing import Any

import pytest

from parallel.launch import Place
from pretrain.cluster.goodput import attempts, goodput
from pretrain.timeline import Timeline, read

FIRST, OTHER = Place(0, 2, 0, 2), Place(1, 2, 1, 2)
PARTS = ("useful", "start", "data", "save", "lost", "restart", "other", "unaccounted")


def test_the_seconds_of_a_life_add_up_to_its_wall_time(tmp_path: Path) -> None:
    spent = {"data": 0.0, "save": 0.0, "other": 0.0}
    timeline = Timeline(tmp_path, FIRST, 7, spent)
    for step in range(8, 20):
        spent["data"] += 1e-6
        timeline.passed(step, line=step % 5 == 0)
    spent["save"] += 2e-6
    timeline.end(19)
    (life,) = read(tmp_path)
    assert (life.begin["step"], life.begin["world"], life.begin["job"]) == (7, 2, None)
    assert life.begin["started"] < life.begin["time"]
    assert [(line["step"], line["steps"]) for line in life.lines] == [
        (8, 1),
        (10, 2),
        (15, 5),
        (19, 4),
    ]
    assert life.ended
    assert sum(line["seconds"]["data"] for line in life.lines) == pytest.approx(12e-6)
    assert life.lines[-1]["seconds"]["save"] == pytest.approx(2e-6)
    total = sum(sum(line["seconds"].values()) for line in life.lines)
    assert total == pytest.approx(life.last - life.begin["time"], abs=0.01)


def test_only_the_first_rank_writes_and_a_request_is_noted_once(tmp_path: Path) -> None:
    for place in (OTHER, FIRST):
        timeline = Timeline(tmp_path, place, 0, {})
        assert [timeline.asked(step, step > 2) for step in range(5)] == [False] * 3 + [True] * 2
        timeline.passed(5, line=False)
        timeline.end(5)
    events = [json.loads(line) for line in (tmp_path / "timeline.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["begin", "asked", "steps", "end"]
    assert events[1]["step"] == 3


def test_a_full_disk_ends_nothing_and_half_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "timeline.jsonl").symlink_to("/dev/full")
    timeline = Timeline(tmp_path, FIRST, 0, {})
    timeline.passed(1, line=True)
    (tmp_path / "timeline.jsonl").unlink()
    later = Timeline(tmp_path, FIRST, 1, {})
    with (tmp_path / "timeline.jsonl").open("a") as file:
        file.write('{"event": "steps", "ti')
    later.passed(2, line=True)
    later.end(2)
    (life,) = read(tmp_path)
    assert [line["event"] for line in life.lines] == ["end"]


class History:
    """Writes the two files of a run; its clock is moved by hand."""

    def __init__(self, run: Path) -> None:
        self.run, self.now, self.step = run, 1000.0, 0

    def write(self, name: str, **values: Any) -> None:
        with (self.run / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({"time": self.now, **values}) + "\n")

    def attempt(self, event: str, restart: int, **values: Any) -> None:
        whole = {"event": event, "job": "17", "restart": restart, "nodes": "node[1-2]", "gpus": 16}
        self.write("attempts", **(whole | values))

    def life(self, restart: int, step: int, after: float, job: str | None = "17") -> None:
        """The loop begins, so many seconds after its process."""
        started = self.now
        self.now, self.step = self.now + after, step
        names = {"world": 4, "job": job, "restart": restart, "started": started}
        self.write("timeline", event="begin", step=step, **names)

    def steps(self, to: int, event: str = "steps", **seconds: float) -> None:
        made = to - self.step if to >= self.step else 6
        self.now, self.step = self.now + sum(seconds.values()), to
        self.write("timeline", event=event, step=to, steps=made, seconds=seconds)

    def rest(self, seconds: float) -> "History":
        self.now += seconds
        return self

    def goodput(self, stands: int = 0, now: float | None = None) -> dict[str, Any]:
        found = goodput(attempts(self.run), stands=stands, now=now)
        parts = sum(found[f"{part}_s"] for part in PARTS)
        assert found["allocated_s"] == pytest.approx(parts, abs=1e-9)
        return found


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path)


def seconds(found: dict[str, Any]) -> dict[str, float]:
    return {part: found[f"{part}_s"] for part in PARTS if found[f"{part}_s"]}


def test_a_run_without_a_fault_is_split_into_its_kinds(history: History) -> None:
    history.attempt("begin", 0)
    history.rest(10).life(0, 0, after=20)
    history.steps(10, step=50, data=4, save=2, other=1)
    history.steps(20, "end", step=45, save=3)
    history.rest(5).attempt("end", 0, outcome="done")
    found = history.goodput()
    kinds = {"useful": 95, "start": 30, "data": 4, "save": 5, "other": 6}
    assert seconds(found) == kinds
    assert found["allocated_s"] == 140
    assert found["goodput"] == pytest.approx(95 / 140)
    assert found["gpu_hours"] == pytest.approx(140 * 16 / 3600)
    assert found["attempts"] == 1


def test_a_crash_loses_what_was_made_after_the_checkpoint(history: History) -> None:
    history.attempt("begin", 0)
    history.life(0, 0, after=30)
    history.steps(10, step=50, data=4, save=2)
    history.steps(20, step=60, data=7, save=1, other=2)
    history.rest(15).attempt("end", 0, outcome="crashed", code=1)
    assert seconds(history.goodput(stands=10)) == {
        "useful": 50, "data": 4, "save": 2, "start": 30, "lost": 70, "restart": 15
    }  # fmt: skip
    history.rest(600).attempt("begin", 1)  # the queue is nobody's
    history.rest(8).life(1, 10, after=12)
    history.steps(20, "end", step=55, save=5)
    history.rest(1).attempt("end", 1, outcome="done")
    found = history.goodput()
    assert seconds(found) == {
        "useful": 105, "data": 4, "save": 7, "start": 30, "lost": 70, "restart": 35, "other": 1
    }  # fmt: skip
    assert (found["attempts"], found["allocated_s"]) == (2, 171 + 81)


def test_an_attempt_that_never_trained_is_start_or_restart(history: History) -> None:
    history.attempt("begin", 0)
    history.rest(40).attempt("end", 0, outcome="unhealthy", code=1)
    history.attempt("begin", 1)
    history.life(1, 0, after=20)
    history.steps(5, step=10)
    history.rest(3)
    history.attempt("end", 1, outcome="lost", estimated=True)
    history.attempt("begin", 2)
    history.rest(7).attempt("end", 2, outcome="crashed")
    assert seconds(history.goodput(stands=5)) == {"useful": 10, "start": 40, "restart": 20 + 3 + 7}
    assert seconds(history.goodput(stands=0)) == {"lost": 10, "start": 40, "restart": 20 + 3 + 7}


def test_a_roll_back_loses_steps_that_were_written_and_those_that_were_not(
    history: History,
) -> None:
    history.life(0, 0, after=5, job=None)
    history.steps(10, step=20, save=1)
    history.steps(20, step=21, data=2)
    history.steps(10, step=6, other=3)  # noticed at 26; back at 10
    history.steps(20, step=22, data=1)
    history.steps(20, "end", save=4)
    found = history.goodput()
    assert seconds(found) == {"useful": 42, "data": 1, "save": 5, "start": 5, "lost": 23 + 9}
    assert found["gpu_hours"] == pytest.approx(found["allocated_s"] * 4 / 3600)


def test_a_line_that_spans_the_checkpoint_is_shared_out(history: History) -> None:
    history.life(0, 0, after=5, job=None)
    history.steps(10, step=30, data=10)
    history.rest(50).life(0, 4, after=6, job=None)
    history.steps(10, "end", step=18)
    found = history.goodput()
    assert seconds(found) == {"useful": 12 + 18, "data": 4, "start": 5, "lost": 24, "restart": 6}
    assert found["allocated_s"] == 45 + 24


def test_the_attempt_that_goes_on_is_counted_until_now(history: History) -> None:
    history.attempt("begin", 0)
    assert seconds(history.goodput(now=1009)) == {"start": 9}
    history.life(0, 0, after=20)
    history.steps(10, step=50)
    assert seconds(history.goodput(now=1078)) == {"useful": 50, "start": 20, "unaccounted": 8}


def test_a_life_without_a_job_is_its_own_attempt(history: History) -> None:
    history.attempt("begin", 0)
    history.life(0, 0, after=2)
    history.steps(10, "end", step=10)
    history.attempt("end", 0, outcome="stopped")
    history.rest(100).life(0, 10, after=3, job=None)
    history.steps(20, "end", step=11)
    found = history.goodput()
    assert seconds(found) == {"useful": 21, "start": 2, "restart": 3}
    assert found["attempts"] == 2


def test_without_any_file_nothing_was_allocated(history: History) -> None:
    found = history.goodput()
    assert (found["allocated_s"], found["goodput"], found["attempts"]) == (0, None, 0)
