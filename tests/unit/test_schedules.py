"""Schedules by hand-computed numbers; they are functions of the step and of nothing else."""

import math

import pytest
from pydantic import TypeAdapter, ValidationError

from pretrain.schedules import WSD, Constant, Cosine, ScheduleConfig, every


def curve(schedule: ScheduleConfig, steps: int) -> list[float]:
    return [schedule(step, steps) for step in range(steps)]


def test_constant_warms_up_in_equal_parts_and_stays() -> None:
    assert curve(Constant(warmup=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert curve(Constant(), 2) == [1.0, 1.0]


def test_cosine_falls_from_peak_to_final() -> None:
    schedule = Cosine(warmup=2, final=0.1)
    assert curve(schedule, 10)[:3] == [0.5, 1.0, 1.0]
    assert schedule(6, 10) == pytest.approx(0.55)
    assert schedule(4, 10) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule(10, 10) == schedule(500, 10) == pytest.approx(0.1)


def test_wsd_is_flat_and_then_cools_down() -> None:
    linear = WSD(warmup=2, cooldown=4)
    assert curve(linear, 10) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert linear(10, 10) == linear(11, 10) == 0.0
    root = WSD(cooldown=4, shape="sqrt", final=0.2)
    assert root(7, 10) == pytest.approx(1 - 0.8 * 0.5)
    assert root(10, 10) == pytest.approx(0.2)


def test_own_length_goes_before_that_of_the_run() -> None:
    assert Cosine(steps=100)(20, 20) == Cosine()(20, 100)
    assert WSD(cooldown=10, steps=100)(19, 20) == 1.0


def test_runs_shorter_than_their_parts_stay_in_range() -> None:
    for schedule in (Constant(warmup=50), Cosine(warmup=50), WSD(warmup=50, cooldown=200)):
        factors = curve(schedule, 20)
        assert all(0.0 < factor <= 1.0 for factor in factors)
    assert Cosine(warmup=5)(5, 5) == 0.0


def test_factor_does_not_depend_on_what_was_asked_before() -> None:
    schedule = WSD(warmup=3, cooldown=3)
    forwards = curve(schedule, 12)
    assert [schedule(step, 12) for step in reversed(range(12))] == forwards[::-1]


def test_every_counts_done_steps() -> None:
    assert [step for step in range(10) if every(3, step)] == [3, 6, 9]
    assert not any(every(0, step) for step in range(10))


def test_kind_chooses_the_schedule_and_wrong_mixes_are_refused() -> None:
    adapter: TypeAdapter[ScheduleConfig] = TypeAdapter(ScheduleConfig)
    for schedule in (Constant(warmup=1), Cosine(final=0.5), WSD(cooldown=7)):
        assert adapter.validate_python(schedule.model_dump()) == schedule
    with pytest.raises(ValidationError, match="cooldown"):
        adapter.validate_python({"kind": "cosine", "cooldown": 5})
    with pytest.raises(ValidationError, match=r"warmup=5 \+ cooldown=6 do not fit into steps=10"):
        WSD(warmup=5, cooldown=6, steps=10)
