"""The core models are not far slower beside each other than they were: a guard, not the promise.

The promise is `python -m tests.speed.ratios`. These bounds are looser on purpose, because a shared
machine moves every ratio; it is asked up to three times.
"""

import pytest

from tests.speed import ratios

GUARDS = {"a": 2.0, "d": 1.1}  # wanted: 1.5 at most, 1.5 at least


@pytest.mark.timing
def test_no_ratio_is_far_from_what_is_promised() -> None:
    names = [name for key in GUARDS for name in ratios.RATIOS[key][1:3]]
    for _ in range(3):
        times = ratios.measure(names, rounds=1, threads=1)
        found = {key: ratios.ratio(key, times, "cpu_s") for key in GUARDS}
        if found["a"] <= GUARDS["a"] and found["d"] >= GUARDS["d"]:
            return
    pytest.fail(f"ratios {found} are outside the guards {GUARDS}")
