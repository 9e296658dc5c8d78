"""Objectives against a float64 re-statement written here from the papers, one number at a time."""

import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pretrain.objectives import DDPM, Flow, Objective, ObjectiveConfig, diffusion

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPE = (3, 4, 4)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def tensors(t: Tensor, channels: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """pred near the truth, x that also reaches outside [-1, 1], noise; seeded."""
    make = torch.Generator().manual_seed(0)
    x = torch.randn(len(t), *SHAPE, generator=make)
    noise = torch.randn(len(t), *SHAPE, generator=make)
    pred = torch.randn(len(t), channels, *SHAPE[1:], generator=make) * spread
    pred[:, : SHAPE[0]] += noise
    return pred, x, noise


def normal_cdf(z: float) -> float:
    return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def hybrid_loss(pred: Tensor, x: Tensor, noise: Tensor, t: int) -> tuple[float, float]:
    """(squared error, bound in bits) of one sample, in the papers' long form, scalar by scalar."""
    betas = [1e-4 + (2e-2 - 1e-4) * i / 999 for i in range(1000)]
    bars = [1.0]
    for beta in betas:
        bars.append(bars[-1] * (1 - beta))
    bar, before, beta = bars[t + 1], bars[t], betas[t]
    lowest = beta * (1 - before) / (1 - bar)
    if t == 0:
        lowest = betas[1] * (1 - bars[1]) / (1 - bars[2])
    on_x = beta * math.sqrt(before) / (1 - bar)
    on_x_t = (1 - before) * math.sqrt(1 - beta) / (1 - bar)
    eps_hat, v = pred[:3].flatten().tolist(), pred[3:].flatten().tolist()
    squares = bits = 0.0
    for e, w, a, n in zip(eps_hat, v, x.flatten().tolist(), noise.flatten().tolist(), strict=True):
        squares += (n - e) ** 2
        noisy = math.sqrt(bar) * a + math.sqrt(1 - bar) * n
        guess = (noisy - math.sqrt(1 - bar) * e) / math.sqrt(bar)
        mean, mean_hat = on_x * a + on_x_t * noisy, on_x * guess + on_x_t * noisy
        part = (w + 1) / 2
        log_var = part * math.log(beta) + (1 - part) * math.log(lowest)
        if t > 0:
            nats = 0.5 * (
                -1
                + log_var
                - math.log(lowest)
                + math.exp(math.log(lowest) - log_var)
                + (mean - mean_hat) ** 2 * math.exp(-log_var)
            )
        else:
            std = math.exp(0.5 * log_var)
            above = normal_cdf((a - mean_hat + 1 / 255) / std)
            below = normal_cdf((a - mean_hat - 1 / 255) / std)
            inside = above if a < -0.999 else 1 - below if a > 0.999 else above - below
            nats = -math.log(max(inside, 1e-12))
        bits += nats / math.log(2)
    return squares / len(v), bits / len(v)


@pytest.mark.parametrize("spread", [0.05, 1.0])
def test_hybrid_loss_is_the_published_one_to_1e_6(device: str, spread: float) -> None:
    t = torch.tensor([0, 0, 0, 1, 2, 10, 250, 500, 998, 999])
    pred, x, noise = tensors(t, 6, spread)
    loss = DDPM().loss(pred.to(device), x.to(device), noise.to(device), t.to(device))
    assert loss.dtype == torch.float32
    assert loss.shape == t.shape
    for i, timestep in enumerate(t.tolist()):
        sample = (pred[i].double(), x[i].double(), noise[i].double())
        assert float(loss[i]) == pytest.approx(sum(hybrid_loss(*sample, timestep)), rel=1e-6)


def test_bound_teaches_the_variance_only() -> None:
    t = torch.tensor([0, 3, 700])
    pred, x, noise = tensors(t, 6, 0.1)
    pred.requires_grad_()
    DDPM().loss(pred, x, noise, t).sum().backward()
    assert pred.grad is not None
    eps_only = 2 * (pred.detach()[:, :3] - noise) / math.prod(SHAPE)
    torch.testing.assert_close(pred.grad[:, :3], eps_only)
    step = 1e-4
    moved = pred.detach().double().clone()
    moved[1, 4, 2, 2] += step
    up = hybrid_loss(moved[1], x[1].double(), noise[1].double(), 3)[1]
    moved[1, 4, 2, 2] -= 2 * step
    down = hybrid_loss(moved[1], x[1].double(), noise[1].double(), 3)[1]
    assert float(pred.grad[1, 4, 2, 2]) == pytest.approx((up - down) / (2 * step), rel=1e-4)


def test_fresh_net_has_a_small_bound_except_at_the_data() -> None:
    t = torch.tensor([0] * 64 + [500] * 64 + [999] * 64)
    _, x, noise = tensors(t, 6)
    zero = torch.zeros(len(t), 6, *SHAPE[1:])
    bits = DDPM().loss(zero, x, noise, t) - noise.square().flatten(1).mean(1)
    assert 1.5 < float(bits[:64].mean()) < 3.0
    assert 0.005 < float(bits[64:].mean()) < 0.03


def test_ddpm_corrupts_by_the_linear_chain(device: str) -> None:
    t = torch.tensor([0, 499, 999])
    _, x, noise = tensors(t, 6)
    bars = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[t.numpy()]
    expected = [
        math.sqrt(b) * x[i] + math.sqrt(1 - b) * noise[i] for i, b in enumerate(bars.tolist())
    ]
    x_t = DDPM().corrupt(x.to(device), noise.to(device), t.to(device)).cpu()
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, torch.stack(expected))


def test_ddpm_time_covers_every_timestep_evenly() -> None:
    u = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(DDPM().time(u), torch.arange(1000))
    assert DDPM().time(torch.tensor([0.0, 1 - 2.0**-24])).tolist() == [0, 999]
    t = torch.tensor([0, 999])
    assert DDPM().embed(t).tolist() == [0.0, 999.0]
    assert DDPM().fraction(t).tolist() == pytest.approx([0.0, 0.999])


def test_respaced_chain_of_all_timesteps_is_the_chain() -> None:
    whole, again = DDPM().chain(), diffusion(DDPM().chain().alphas_bar.copy())
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(np.exp(whole.log_beta), np.linspace(1e-4, 2e-2, 1000), rtol=1e-9)


def test_velocity_inverts_corrupt(device: str) -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    _, x, noise = tensors(t, 3)
    x, noise, t = x.to(device), noise.to(device), t.to(device)
    velocity = noise - x
    x_t = Flow().corrupt(x, noise, t)
    torch.testing.assert_close(x_t - t[:, None, None, None] * velocity, x)
    assert torch.equal(x_t[0], x[0])
    assert torch.equal(x_t[2], noise[2])
    assert Flow().loss(velocity, x, noise, t).tolist() == [0.0, 0.0, 0.0]


def test_flow_ignores_the_second_half_of_the_channels() -> None:
    t = torch.tensor([0.1, 0.9])
    pred, x, noise = tensors(t, 6)
    by_hand = (pred[:, :3].double() - (noise - x).double()).square().flatten(1).mean(1)
    torch.testing.assert_close(Flow().loss(pred, x, noise, t).double(), by_hand, rtol=1e-6, atol=0)
    assert torch.equal(Flow().loss(pred, x, noise, t), Flow().loss(pred[:, :3], x, noise, t))


def test_flow_time_follows_its_law() -> None:
    u = (torch.arange(20_000) + 0.5) / 20_000
    assert torch.equal(Flow().time(u), u)
    logits = torch.logit(Flow(law="logit_normal", loc=-0.5, scale=1.5).time(u).double())
    assert float(logits.mean()) == pytest.approx(-0.5, abs=1e-3)
    assert float(logits.std()) == pytest.approx(1.5, abs=5e-3)
    assert Flow(law="logit_normal").time(torch.tensor([0.0, 0.5])).tolist() == [0.0, 0.5]


def test_flow_shift_moves_time_towards_the_noise() -> None:
    shifted = Flow(shift=3.0).time(torch.tensor([0.0, 0.5, 0.9]))
    torch.testing.assert_close(shifted, torch.tensor([0.0, 0.75, 2.7 / 2.8]))


def test_flow_time_enters_the_sinusoid_scaled_unless_parity_is_asked() -> None:
    t = torch.tensor([0.0, 0.5])
    assert Flow().embed(t).tolist() == [0.0, 500.0]
    assert Flow(time_scale=1.0).embed(t).tolist() == [0.0, 0.5]
    assert Flow().fraction(t).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("objective", [DDPM(), Flow()])
def test_losses_of_samples_do_not_know_each_other(objective: Objective) -> None:
    t = objective.time(torch.tensor([0.0, 0.3, 0.8]))
    pred, x, noise = tensors(t, 6)
    whole = objective.loss(pred, x, noise, t)
    alone = [
        objective.loss(pred[i : i + 1], x[i : i + 1], noise[i : i + 1], t[i : i + 1])
        for i in range(3)
    ]
    assert torch.equal(whole, torch.cat(alone))


def test_pred_of_wrong_channels_is_refused_with_shapes() -> None:
    t = torch.tensor([0])
    pred, x, noise = tensors(t, 3)
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\); expected \(1, 6, 4, 4\).*learn_sigma"):
        DDPM().loss(pred, x, noise, t)
    assert (DDPM().pred_channels(4), Flow().pred_channels(4)) == (8, 4)


def test_kind_chooses_the_objective_and_idle_fields_are_refused() -> None:
    adapter = TypeAdapter(ObjectiveConfig)
    for objective in (DDPM(timesteps=100), Flow(law="logit_normal", loc=1.0)):
        assert adapter.validate_python(objective.model_dump()) == objective
    with pytest.raises(ValidationError, match="law='logit_normal'"):
        adapter.validate_python({"kind": "flow", "loc": 0.3})
    with pytest.raises(ValidationError, match="shift"):
        adapter.validate_python({"kind": "ddpm", "shift": 3.0})
