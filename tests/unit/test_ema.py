"""Averages of weights against sums over every update; a step left out changes no bit."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from parallel.shards import Box, Extent, Piece
from pretrain import averaging
from pretrain.ema import EMA, EMAConfig

SIZE = 6
GO, SKIP = torch.tensor(False), torch.tensor(True)


def backend(values: Tensor) -> Any:
    box = Box((len(values),), (0,), (len(values),))
    empty = Piece(values[:0], Extent(box, 0, 0))
    return SimpleNamespace(pieces={"w": Piece(values, Extent(box, 0, SIZE)), "none": empty})


def run(cfg: EMAConfig, path: Tensor) -> dict[str, Tensor]:
    """The averages after one update a row. path: (updates, SIZE)."""
    values = torch.zeros(SIZE)
    ema = EMA(cfg, backend(values))
    for step, weights in enumerate(path):
        values.copy_(weights)
        ema.update(step, torch.tensor(float(step + 1)), GO)
    return {name: piece.values for name, piece in ema.state().items()}


@pytest.fixture
def path() -> Tensor:
    return torch.randn(200, SIZE, generator=torch.Generator().manual_seed(0)).cumsum(0)


def test_every_average_has_its_name_and_its_parameters() -> None:
    cfg = EMAConfig(half_lives=(1000, 50000, 0.5), power=(0.05, 0.1))
    names = ("ema", "ema_h1000", "ema_h50000", "ema_h0.5", "ema_p0.05", "ema_p0.1")
    assert cfg.names == names
    state = EMA(cfg, backend(torch.ones(SIZE))).state()
    assert list(state) == [f"{name}.{part}" for name in names for part in ("w", "none")]
    assert EMAConfig().names == ("ema",)


@pytest.mark.parametrize("half_life", [3.0, 40.0])
def test_after_a_half_life_half_of_the_old_average_is_left(half_life: float, path: Tensor) -> None:
    cfg = EMAConfig(warmup=False, decay=0.9, half_lives=(half_life,))
    held = run(cfg, path)
    for name, decay in (("ema", 0.9), (f"ema_h{half_life:g}", 0.5 ** (1 / half_life))):
        ages = torch.arange(len(path) - 1, -1, -1, dtype=torch.float64)
        shares = (1 - decay) * decay**ages  # the start is zero
        wanted = (shares[:, None] * path.double()).sum(0)
        torch.testing.assert_close(held[f"{name}.w"].double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.25])
def test_a_power_average_weighs_updates_by_its_profile(sigma: float, path: Tensor) -> None:
    held = run(EMAConfig(power=(sigma,)), path)[f"ema_p{sigma:g}.w"]
    ends = (torch.arange(len(path) + 1, dtype=torch.float64) / len(path)) ** (
        averaging.gamma(sigma) + 1
    )
    wanted = (ends.diff()[:, None] * path.double()).sum(0)
    torch.testing.assert_close(held.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_first_update_is_copied_bit_for_bit(path: Tensor) -> None:
    held = run(EMAConfig(power=(0.05, 0.2)), path[:1])
    assert torch.equal(held["ema_p0.05.w"], path[0])
    assert torch.equal(held["ema_p0.2.w"], path[0])


def test_a_step_left_out_changes_no_bit_of_any_average_and_counts_for_none(path: Tensor) -> None:
    cfg = EMAConfig(half_lives=(5,), power=(0.1,), warmup=False)
    values = torch.zeros(SIZE)
    ema, made = EMA(cfg, backend(values)), 0.0
    ema.update(0, torch.tensor(0.0), SKIP)  # the first step of all
    for step, weights in enumerate(path, start=1):
        skip = step % 3 == 0
        before = {name: piece.values.clone() for name, piece in ema.state().items()}
        values.copy_(weights)
        made += not skip
        ema.update(step, torch.tensor(made), torch.tensor(skip))
        same = [torch.equal(before[n], p.values) for n, p in ema.state().items() if "w" in n]
        assert same == [skip] * len(cfg.names)
    kept = torch.stack([row for step, row in enumerate(path, start=1) if step % 3])
    for name, wanted in run(cfg, kept).items():
        assert torch.equal(ema.state()[name].values, wanted), name


def test_negative_zeros_survive_a_step_left_out() -> None:
    values = torch.full((SIZE,), -0.0)
    ema = EMA(EMAConfig(half_lives=(5,), power=(0.1,)), backend(values))
    values.zero_()
    ema.update(3, torch.tensor(0.0), SKIP)
    assert all(p.values.signbit().all() for p in ema.state().values())


def test_the_host_is_never_waited_for() -> None:
    """A tensor on meta has no values: whoever looks at one raises."""
    values = torch.zeros(SIZE, device="meta")
    ema = EMA(EMAConfig(half_lives=(5,), power=(0.1,)), backend(values))
    ema.update(3, torch.zeros((), device="meta"), torch.zeros((), device="meta").bool())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"power": (0.3,)}, "0.3 came; expected more than 0 and less than 0.2887"),
        ({"power": (0.1, 0.1)}, "0.1 came twice"),
        ({"half_lives": (7.0, 7.0000001)}, "7 came twice"),
        ({"half_lives": (0.0,)}, "greater than 0"),
    ],
)
def test_averages_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EMAConfig(**changes)
