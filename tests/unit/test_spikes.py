"""The guard's running statistics by brute force, and what it lets pass."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.guard import Guard, GuardConfig, reasons

CPU = torch.device("cpu")


def pair(loss: float, norm: float) -> Tensor:
    return torch.tensor([loss, norm], dtype=torch.float64)


def calm(steps: int, seed: int = 0) -> list[Tensor]:
    """Losses near 2 and norms near 0.1, which scatter by a tenth."""
    noise = np.random.default_rng(seed).normal(0.0, 0.1, (steps, 2))
    return [torch.tensor(row) for row in np.array([2.0, 0.1]) * np.exp(noise)]


def fed(guard: Guard, values: list[Tensor]) -> list[bool]:
    return [bool(guard.judge(value)[0]) for value in values]


def test_mean_and_variance_are_those_of_a_weighted_sum() -> None:
    guard, values = Guard(GuardConfig(window=20, sigma=None), CPU), calm(90)
    assert not any(fed(guard, values))
    logs = np.log(np.stack([value.numpy() for value in values]))
    shares = np.zeros(90)
    for n in range(90):
        share = 1 / min(n + 1, 20)
        shares *= 1 - share
        shares[n] = share
    mean = shares @ logs
    variance = shares @ (logs - mean) ** 2
    wanted = np.stack([mean, variance, [90.0, 90.0]], axis=1)
    np.testing.assert_allclose(guard.statistics.numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_is_left_out_from_the_first_step_on(bad: float, which: int) -> None:
    for steps in (0, 80):
        guard = Guard(GuardConfig(), CPU)
        fed(guard, calm(steps))
        before = guard.statistics.clone()
        value = pair(2.0, 0.1)
        value[which] = bad
        assert fed(guard, [value]) == [True]
        assert torch.equal(guard.statistics[which], before[which])
    value[:] = bad
    before = guard.statistics.clone()
    assert fed(guard, [value]) == [True]
    assert torch.equal(guard.statistics, before)


def test_a_spike_of_either_is_left_out_once_there_are_statistics() -> None:
    for spike in (pair(9.0, 0.1), pair(2.0, 0.5)):
        guard = Guard(GuardConfig(after=50), CPU)
        assert fed(guard, [*calm(48), spike]) == [False] * 49
        guard = Guard(GuardConfig(after=50), CPU)
        assert (
            fed(guard, [*calm(50), spike, *calm(20, seed=1)])
            == [False] * 50 + [True] + [False] * 20
        )


def test_the_limit_is_sigma_deviations_or_the_factor_whichever_is_more() -> None:
    values = calm(100)
    logs = torch.stack(values).log()
    wide = (logs.mean(0) + 8 * logs.std(0, correction=0)).exp()
    guard = Guard(GuardConfig(sigma=8.0, factor=2.0), CPU)
    fed(guard, values)
    torch.testing.assert_close(guard.judge(values[0])[1], wide)
    guard = Guard(GuardConfig(sigma=8.0, factor=5.0), CPU)
    fed(guard, values)
    torch.testing.assert_close(guard.judge(values[0])[1], 5 * logs.mean(0).exp())


def test_a_spike_moves_the_statistics_no_further_than_its_limit() -> None:
    taken = []
    for height in (100.0, 1e6):
        guard = Guard(GuardConfig(), CPU)
        fed(guard, [*calm(80), pair(height, height)])
        taken.append(guard.statistics.clone())
    assert torch.equal(*taken)


@pytest.mark.parametrize("shift", [3.0, 10.0, 1000.0])
def test_a_lasting_shift_becomes_the_new_normal_before_a_roll_back(shift: float) -> None:
    cfg = GuardConfig()
    guard = Guard(cfg, CPU)
    fed(guard, calm(300))
    skips = fed(guard, [shift * value for value in calm(300, seed=1)])
    assert 0 < sum(skips) < cfg.max_skips
    assert skips == sorted(skips, reverse=True)  # a row at the start, and none after it


def test_zero_is_no_spike_and_is_not_taken_in() -> None:
    guard = Guard(GuardConfig(), CPU)
    fed(guard, calm(80))
    before = guard.statistics.clone()
    assert fed(guard, [pair(0.0, 0.0)]) == [False]
    assert torch.equal(guard.statistics, before)


def test_without_sigma_only_what_is_not_finite_is_left_out() -> None:
    guard = Guard(GuardConfig(sigma=None), CPU)
    assert fed(guard, [*calm(80), pair(1e9, 1e9), pair(math.nan, 0.1)])[80:] == [False, True]


def test_the_host_is_never_waited_for() -> None:
    """A tensor on meta has no values: whoever looks at one raises."""
    guard = Guard(GuardConfig(), torch.device("meta"))
    skip, limits = guard.judge(torch.empty(2, dtype=torch.float64, device="meta"))
    assert (skip.shape, skip.dtype, limits.shape) == ((), torch.bool, (2,))


def test_reasons_name_step_value_and_limit() -> None:
    assert reasons(7, (9.0, 0.1), (3.5, 0.2)) == "step 7 is left out: loss 9 is above 3.5"
    assert reasons(8, (math.nan, 0.3), (math.inf, 0.2)) == (
        "step 8 is left out: loss is not finite, gradient norm 0.3 is above 0.2"
    )
