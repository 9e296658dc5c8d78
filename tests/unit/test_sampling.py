"""Samplers against data whose best denoiser is known: normal, a mean and deviation a class."""

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pretrain.objectives import DDPM, Flow, Objective, diffusion
from pretrain.sampling import SampleConfig, SamplingError, check, respaced, sample

SHAPE = (4, 2, 2)
NULL = 3
MEANS = torch.tensor([-1.0, 0.5, 2.0, 0.3])
STDS = torch.tensor([0.2, 0.6, 1.3, 1.0])

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


def columns(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def flow_net(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """E[noise - x | x_t] for x ~ N(mean, std^2), time in sinusoid units."""
    time, mean, std = columns(t.double() / 1000), columns(MEANS[cond]), columns(STDS[cond])
    off = x_t - (1 - time) * mean
    var = (1 - time) ** 2 * std**2 + time**2
    return time / var * off - (mean + (1 - time) * std**2 / var * off)


def ddpm_net(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """E[noise | x_t], and v = -1 (the posterior's variance)."""
    bar = columns(torch.from_numpy(DDPM().chain().alphas_bar)[t.long()])
    mean, std = columns(MEANS[cond]), columns(STDS[cond])
    eps = (1 - bar).sqrt() / (bar * std**2 + 1 - bar) * (x_t - bar.sqrt() * mean)
    return torch.cat([eps, -torch.ones_like(eps)], dim=1)


def best_net(steps: int) -> Predict:
    """The same with the v that makes every step of a chain of so many exact."""
    visited = respaced(1000, steps)
    chain = diffusion(DDPM().chain().alphas_bar[visited])

    def net(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        i = visited.index(int(t[0]))
        bar, log_beta, log_posterior = (
            float(table[i]) for table in (chain.alphas_bar, chain.log_beta, chain.log_posterior)
        )
        unknown = STDS[cond].double() ** 2 * (1 - bar) / (bar * STDS[cond].double() ** 2 + 1 - bar)
        variance = math.exp(log_posterior) + float(chain.mean_x[i]) ** 2 * unknown
        v = 2 * (variance.log() - log_posterior) / (log_beta - log_posterior) - 1
        return torch.cat([ddpm_net(x_t, t, cond)[:, :4], columns(v).expand_as(x_t)], dim=1)

    return net


def draw(
    predict: Predict,
    objective: Objective,
    labels: list[int],
    indices: list[int] | None = None,
    seed: int = 0,
    **cfg: object,
) -> Tensor:
    chosen = SampleConfig.model_validate({"guidance": 1.0} | cfg)
    return sample(
        predict,
        objective,
        chosen,
        torch.tensor(labels),
        null=NULL,
        shape=SHAPE,
        seed=seed,
        indices=indices,
    )


def start(n: int) -> Tensor:
    """The noise that the samplers start from: what is left if nothing is ever predicted."""
    return draw(lambda x, t, c: torch.zeros_like(x), Flow(), [0] * n, steps=1, sampler="euler")


def flow_error(sampler: str, steps: int, shift: float = 1.0) -> float:
    """Root mean square distance to the exact solution of the flow, mean + std * noise."""
    labels = [0, 1, 2] * 4
    found = draw(flow_net, Flow(shift=shift), labels, sampler=sampler, steps=steps)
    exact = columns(MEANS[labels]) + columns(STDS[labels]) * start(12)
    return float((found - exact).square().mean().sqrt())


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_euler_error_halves_and_heun_error_quarters(shift: float) -> None:
    for steps in (32, 64):
        assert flow_error("euler", steps, shift) / flow_error("euler", 2 * steps, shift) == (
            pytest.approx(2, abs=0.2)
        )
        assert flow_error("heun", steps, shift) / flow_error("heun", 2 * steps, shift) == (
            pytest.approx(4, abs=0.6)
        )
    assert flow_error("heun", 64, shift) < 0.1 * flow_error("euler", 64, shift)


def test_ddim_follows_its_deterministic_path_to_the_data() -> None:
    labels = [0, 1, 2] * 4
    bar = float(DDPM().chain().alphas_bar[-1])
    mean, std = columns(MEANS[labels]), columns(STDS[labels])
    at_start = (start(12) - math.sqrt(bar) * mean) / (bar * std**2 + 1 - bar).sqrt()
    exact = mean + std * at_start
    errors = []
    for steps in (50, 100, 1000):
        found = draw(ddpm_net, DDPM(), labels, sampler="ddim", steps=steps)
        errors.append(float((found - exact).square().mean().sqrt()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


@pytest.mark.parametrize(
    ("objective", "net", "cfg"),
    [
        (DDPM(), best_net(250), {"sampler": "ddpm", "steps": 250}),
        (DDPM(), best_net(25), {"sampler": "ddpm", "steps": 25}),
        (DDPM(), ddpm_net, {"sampler": "ddim", "steps": 250}),
        (Flow(), flow_net, {"sampler": "euler", "steps": 200}),
        (Flow(), flow_net, {"sampler": "heun", "steps": 40}),
    ],
)
def test_samples_have_the_mean_and_deviation_of_the_data(
    objective: Objective, net: Predict, cfg: dict[str, object]
) -> None:
    labels = [0, 1, 2] * 40
    found = draw(net, objective, labels, batch=120, **cfg)
    for label in range(3):
        mine = found[torch.tensor(labels) == label]
        std = float(STDS[label])
        assert float(mine.mean()) == pytest.approx(float(MEANS[label]), abs=0.1 * std + 0.01)
        assert float(mine.std()) == pytest.approx(std, rel=0.08)


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance() -> None:
    ancestral = draw(ddpm_net, DDPM(), [0, 1, 2], sampler="ddpm", steps=20)
    ddim = draw(ddpm_net, DDPM(), [0, 1, 2], sampler="ddim", steps=20, eta=1.0)
    torch.testing.assert_close(ancestral, ddim, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("objective", "net", "sampler"),
    [(DDPM(), ddpm_net, "ddpm"), (DDPM(), ddpm_net, "ddim"), (Flow(), flow_net, "heun")],
)
def test_any_split_gives_the_same_pictures(
    objective: Objective, net: Predict, sampler: str
) -> None:
    labels = [0, 1, 2, 0, 1, 2, 0]
    whole = draw(net, objective, labels, sampler=sampler, steps=5, guidance=2.0, batch=7)
    pieces = draw(net, objective, labels, sampler=sampler, steps=5, guidance=2.0, batch=2)
    mine = draw(net, objective, [2, 0, 2], [5, 6, 2], sampler=sampler, steps=5, guidance=2.0)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine, whole[[5, 6, 2]], rtol=1e-6, atol=1e-6)
    assert not torch.equal(draw(net, objective, labels, sampler=sampler, steps=5, seed=1), whole)


def test_guidance_is_one_pass_of_a_doubled_batch() -> None:
    seen = []

    def net(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.append((len(x_t), len(t), cond.tolist()))
        return torch.cat([columns(cond.float()).expand_as(x_t), torch.zeros_like(x_t)], dim=1)

    for guidance, batch, cond in [(1.0, 2, [0, 1]), (3.0, 4, [0, 1, 3, 3]), (0.0, 2, [3, 3])]:
        seen.clear()
        found = draw(net, Flow(), [0, 1], steps=1, guidance=guidance)
        assert seen == [(batch, batch, cond)]
        velocity = NULL + guidance * (torch.tensor([0.0, 1.0]) - NULL)
        torch.testing.assert_close(start(2) - columns(velocity).expand_as(found), found)


def test_parity_mode_guides_three_channels_and_never_the_variance() -> None:
    def net(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        values = torch.where(cond == NULL, 0.0, 1.0)
        return columns(values).expand(-1, 8, *SHAPE[1:])

    seen: list[Tensor] = []

    def spy(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.append(x_t)
        return net(x_t, t, cond)

    found = draw(spy, Flow(), [0], steps=1, guidance=2.0, guidance_channels=3)
    moved = (start(1) - found).mean(dim=(0, 2, 3))
    torch.testing.assert_close(moved, torch.tensor([2.0, 2.0, 2.0, 1.0]))
    assert torch.equal(seen[0][0], seen[0][1])


def test_variance_is_never_guided() -> None:
    def net(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        v = torch.where(cond == NULL, -5.0, 0.5)
        return torch.cat([x_t, columns(v).expand_as(x_t)], dim=1)

    cfg = {"sampler": "ddpm", "steps": 2}
    guided, plain = (draw(net, DDPM(), [0], guidance=g, **cfg) for g in (2.0, 1.0))
    torch.testing.assert_close(guided, plain)


def test_last_ancestral_step_adds_no_noise() -> None:
    def net(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Knows that x = 0 everywhere; claims a huge variance at t = 0."""
        bar = columns(torch.from_numpy(DDPM().chain().alphas_bar)[t.long()])
        eps = x_t / (1 - bar).sqrt()
        return torch.cat([eps, torch.where(columns(t) == 0, 50.0, 0.0).expand_as(x_t)], dim=1)

    assert float(draw(net, DDPM(), [0, 1], sampler="ddpm", steps=10).abs().max()) < 1e-5


def test_net_sees_the_timesteps_of_the_whole_chain() -> None:
    seen = []

    def net(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return ddpm_net(x_t, t, cond)

    draw(net, DDPM(), [0], sampler="ddpm", steps=4)
    assert seen == [999.0, 666.0, 333.0, 0.0]
    assert respaced(1000, 1000) == list(range(1000))
    assert respaced(1000, 250)[:4] == [0, 4, 8, 12]
    assert respaced(1000, 1) == [999]


def test_heun_asks_twice_but_not_at_the_data() -> None:
    seen = []

    def net(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return torch.zeros_like(x_t)

    draw(net, Flow(), [0], sampler="heun", steps=2)
    assert seen == [1000.0, 500.0, 500.0]


def test_sampler_of_another_objective_is_refused_with_those_that_fit() -> None:
    for sampler in ("euler", "heun"):
        with pytest.raises(SamplingError, match="sampler=ddpm or ddim"):
            check(SampleConfig(sampler=sampler), DDPM())
    with pytest.raises(SamplingError, match="sampler=euler or heun"):
        draw(flow_net, Flow(), [0], sampler="ddim")
    with pytest.raises(SamplingError, match="steps to 1..1000"):
        check(SampleConfig(sampler="ddpm", steps=1001), DDPM())
    with pytest.raises(ValidationError, match="set sampler=ddim"):
        SampleConfig(sampler="ddpm", eta=0.5)


def test_labels_out_of_range_are_refused() -> None:
    for label in (-1, 4):
        with pytest.raises(SamplingError, match=rf"label {label} came; expected 0..2, or 3"):
            draw(flow_net, Flow(), [0, label])
    with pytest.raises(SamplingError, match="1 indices came for 2 labels"):
        draw(flow_net, Flow(), [0, 1], [0])
    assert draw(flow_net, Flow(), []).shape == (0, *SHAPE)


def test_no_gradient_is_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    assert not draw(lambda x, t, c: x * weight, Flow(), [0], steps=2).requires_grad
