"""Addressed randomness: a number belongs to its address, and addresses do not meet."""

import numpy as np
import pytest
import torch

from pretrain.noise import Stream, draw

SHAPE = (4, 8, 8)
GOLDEN_U = [0.7353996]
GOLDEN_DROP = [0.89021093, 0.02184242, 0.40882486]
GOLDEN_NOISE = [-0.58501327, -0.03115778]


def test_numbers_belong_to_the_slot_whatever_the_batch() -> None:
    whole = draw(7, 3, range(8), SHAPE)
    for slots in ([0, 1, 2, 3], [7, 2], np.array([5])):
        part = draw(7, 3, slots, SHAPE)
        for all_numbers, numbers in zip(whole, part, strict=True):
            assert torch.equal(all_numbers[torch.as_tensor(slots)], numbers)


def test_every_part_of_the_address_counts() -> None:
    addresses = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 0, 0), (0, 2**40, 0)]
    first = [draw(seed, step, [slot], SHAPE).noise for seed, step, slot in addresses]
    first.append(draw(0, 0, [0], SHAPE, stream=Stream.SAMPLE).noise)
    for i, one in enumerate(first):
        for other in first[:i]:
            assert not torch.isclose(one, other, atol=1e-4).any(dim=0).all()


def test_numbers_are_the_ones_of_this_address_for_ever() -> None:
    drawn = draw(2026, 41, [3], (2,), tables=3)
    assert drawn.u.tolist() == pytest.approx(GOLDEN_U, abs=1e-7)
    assert drawn.drop.flatten().tolist() == pytest.approx(GOLDEN_DROP, abs=1e-7)
    assert drawn.noise.flatten().tolist() == pytest.approx(GOLDEN_NOISE, abs=1e-6)


def test_shapes_types_and_ranges() -> None:
    drawn = draw(0, 0, range(5), SHAPE)
    assert drawn.noise.shape == (5, *SHAPE)
    assert drawn.u.shape == drawn.drop.shape == (5,)
    assert {part.dtype for part in drawn} == {torch.float32}
    assert draw(0, 0, range(5), SHAPE, tables=3).drop.shape == (5, 3)
    assert draw(0, 0, [], SHAPE).noise.shape == (0, *SHAPE)


def test_number_of_label_tables_changes_nothing_else() -> None:
    one, three = draw(0, 5, range(6), SHAPE), draw(0, 5, range(6), SHAPE, tables=3)
    assert torch.equal(one.noise, three.noise)
    assert torch.equal(one.u, three.u)
    assert torch.equal(one.drop, three.drop[:, 0])
    assert not torch.equal(three.drop[:, 0], three.drop[:, 1])


def test_distributions_and_independence() -> None:
    drawn = draw(11, 0, range(2000), (64,))
    assert float(drawn.noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(drawn.noise.std()) == pytest.approx(1, abs=0.01)
    assert float(drawn.noise.pow(4).mean()) == pytest.approx(3, abs=0.1)
    for uniform in (drawn.u, drawn.drop):
        assert 0 <= float(uniform.min()) <= float(uniform.max()) < 1
        assert float(uniform.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(uniform.var()) == pytest.approx(1 / 12, abs=0.005)
    rows = torch.stack([drawn.u, drawn.drop, drawn.noise[:, 0], drawn.noise[:, 1]])
    between = torch.corrcoef(rows) - torch.eye(4)
    assert float(between.abs().max()) < 0.08


def test_repeated_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="slot 4 comes 2 times"):
        draw(0, 0, [1, 4, 4], SHAPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "64-bit"),
        ({"step": -1}, "step=-1"),
        ({"slots": [-1]}, "slot -1 is negative"),
        ({"tables": 8}, "tables=8"),
    ],
)
def test_addresses_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    address: dict[str, object] = {"seed": 0, "step": 0, "slots": [0], "shape": SHAPE}
    with pytest.raises(ValueError, match=message):
        draw(**(address | change))  # pyrefly: ignore


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    draw(0, 0, range(3), SHAPE)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
