"""The place in the data, and the stretches it jumps over."""

import pytest

from data_pipeline.cursor import Cursor


def visited(cursor: Cursor, n: int, batches: int) -> list[int]:
    starts, cursor = [], cursor.clear(n)
    for _ in range(batches):
        starts.append(cursor.position)
        cursor = cursor.advance(n)
    return starts


def test_without_stretches_it_counts() -> None:
    assert visited(Cursor(3), 4, 3) == [3, 7, 11]
    assert Cursor(3).advance(4) == Cursor(7)


def test_exactly_the_stretch_is_passed_over() -> None:
    cursor = Cursor(8).pass_over((16, 32))
    assert visited(cursor, 8, 4) == [8, 32, 40, 48]
    assert cursor.advance(8) == Cursor(32, ((16, 32),))
    assert visited(cursor, 4, 4) == [8, 12, 32, 36]


def test_neighbouring_and_nested_stretches_are_one_jump() -> None:
    cursor = Cursor(0).pass_over((16, 24)).pass_over((8, 16)).pass_over((12, 14))
    assert cursor.passed_over == ((8, 16), (12, 14), (16, 24))
    assert visited(cursor, 8, 3) == [0, 24, 32]


def test_a_batch_that_would_touch_a_stretch_starts_behind_it() -> None:
    assert visited(Cursor(0, ((12, 20),)), 8, 3) == [0, 20, 28]
    assert Cursor(18, ((12, 20),)).clear(8).position == 20
    assert Cursor(20, ((12, 20),)).clear(8).position == 20
    assert Cursor(4, ((12, 20),)).clear(8).position == 4


def test_no_batch_touches_a_stretch_whatever_its_size() -> None:
    stretches = ((5, 9), (30, 31), (31, 50), (64, 72))
    for n in (1, 2, 3, 8, 13):
        for start in visited(Cursor(0, stretches), n, 60):
            assert all(start + n <= a or start >= b for a, b in stretches)


@pytest.mark.parametrize("stretch", [(5, 5), (7, 2)])
def test_an_empty_stretch_is_a_mistake(stretch: tuple[int, int]) -> None:
    with pytest.raises(AssertionError, match="empty stretch"):
        Cursor(0, (stretch,))
