"""The sample order: a permutation each epoch, at any position, for any count and lanes."""

import numpy as np
import pytest

from data_pipeline.order import CHUNK, Order, key, permute

COUNTS = [1, 2, 3, 5, 7, 63, 64, 65, 100, 257, 1000, 1437, 5000]


@pytest.mark.parametrize("kind", ["chunks", "samples"])
@pytest.mark.parametrize("lanes", [1, 2, 3, 7, 64, 1024])
def test_each_epoch_is_a_permutation(lanes: int, kind: str) -> None:
    for count in COUNTS:
        order = Order(count, lanes, 5, kind)
        ids = order.samples(np.arange(3 * count)).reshape(3, count)
        assert (np.sort(ids, 1) == np.arange(count)).all(), (count, lanes)


@pytest.mark.parametrize("kind", ["chunks", "samples"])
def test_epochs_and_seeds_differ(kind: str) -> None:
    ids = Order(1000, 16, 1, kind).samples(np.arange(2000)).reshape(2, 1000)
    other = Order(1000, 16, 2, kind).samples(np.arange(1000))
    assert (ids[0] != ids[1]).mean() > 0.9
    assert (ids[0] != other).mean() > 0.9


@pytest.mark.parametrize("kind", ["chunks", "samples"])
def test_any_position_is_answered_alone_as_in_a_block(kind: str) -> None:
    order = Order(10**9, 1024, 0, kind)
    positions = 123_456_789_012 + np.arange(50)
    block = order.samples(positions)
    assert [int(order.samples(p[None])[0]) for p in positions] == block.tolist()
    assert block.min() >= 0
    assert block.max() < 10**9
    assert (order.samples(positions.reshape(5, 10)) == block.reshape(5, 10)).all()


def test_order_visits_every_lane_in_turn() -> None:
    count, lanes = 10_000, 16
    ids = Order(count, lanes, 3).samples(np.arange(count))
    lane = ids // (count // lanes)
    assert all(len(set(lane[i : i + lanes])) == lanes for i in range(0, count, lanes))


def test_a_lane_is_read_in_windows_of_whole_chunks() -> None:
    # The first window of a lane touches only a few chunks, so reads stay close together.
    ids = Order(64_000, 1, 9).samples(np.arange(4 * CHUNK))
    assert len(set(ids // CHUNK)) == 4
    assert (np.diff(ids) != 1).mean() > 0.9


def test_permute_is_close_to_uniform_on_small_sets() -> None:
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(2400):
        image = tuple(permute(np.arange(4), 4, key(seed)).tolist())
        seen[image] = seen.get(image, 0) + 1
    assert len(seen) == 24
    assert min(seen.values()) > 60


def test_permute_mixes_sizes_elementwise() -> None:
    sizes = np.array([10] * 10 + [37] * 37 + [1])
    x = np.concatenate([np.arange(10), np.arange(37), [0]])
    y = permute(x, sizes, key(4))
    assert sorted(y[:10]) == list(range(10))
    assert sorted(y[10:47]) == list(range(37))
    assert y[47] == 0
