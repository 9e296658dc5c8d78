"""Samplers: from noise to latents, with classifier-free guidance.

Knows the objective and a function `predict`; knows no model, mesh or file. The noise of a sample is
a function of (seed, sample index), so any split over ranks and batches gives the same picture.

    latents = sample(predict, objective, cfg, labels, null=10, shape=(4, 16, 16), seed=0)
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pretrain.noise import Stream, draw
from pretrain.objectives import DDPM, Flow, Objective, diffusion

Predict = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # (x_t, embedded t, cond) -> pred, as the model
Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> pred, guided
NoiseAt = Callable[[int], Tensor]  # pass number -> (B, C, H, W)

_FITS = {"ddpm": "ddpm", "ddim": "ddpm", "euler": "flow", "heun": "flow"}


class SamplingError(ValueError):
    """What a person asked of a sampler cannot be done."""


class SampleConfig(BaseModel):
    """How to draw pictures from a trained net."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
    sampler: Literal["ddpm", "ddim", "euler", "heun"] = "euler"  # the last two are for flow
    steps: int = Field(50, ge=1)  # moves from noise to data; heun asks the net about twice in each
    guidance: float = 1.5  # factor of (conditional - unconditional); 1 = conditional alone
    guidance_channels: Literal["all", 3] = "all"  # 3: only the first three, as DiT published
    batch: int = Field(64, ge=1)  # pictures at once, before doubling for guidance
    eta: float = Field(0.0, ge=0.0, le=1.0)  # noise put back by ddim: 0 none, 1 as much as ddpm

    @model_validator(mode="after")
    def _eta_is_used(self) -> "SampleConfig":
        if self.eta and self.sampler != "ddim":
            raise ValueError(
                f"eta={self.eta} came with sampler={self.sampler}; only ddim has it: "
                "drop eta or set sampler=ddim"
            )
        return self


def check(cfg: SampleConfig, objective: Objective) -> None:
    """Raises SamplingError if the sampler cannot serve the objective, naming those that can."""
    kind = "ddpm" if isinstance(objective, DDPM) else "flow"
    if _FITS[cfg.sampler] != kind:
        fitting = " or ".join(name for name, fits in _FITS.items() if fits == kind)
        raise SamplingError(
            f"sampler={cfg.sampler} does not fit a net trained with objective {kind}; "
            f"set sampler={fitting}"
        )
    if isinstance(objective, DDPM) and cfg.steps > objective.timesteps:
        raise SamplingError(
            f"steps={cfg.steps} came for a chain of {objective.timesteps} timesteps; "
            f"set steps to 1..{objective.timesteps}"
        )


@torch.no_grad()
def sample(
    predict: Predict,
    objective: Objective,
    cfg: SampleConfig,
    labels: Tensor,
    *,
    null: int,
    shape: Sequence[int],
    seed: int,
    indices: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Latents for these labels, normalised as in training: (N, *shape) float32 on the device.

    labels: (N,) int64 in 0..null, where null is the label "no class". shape: (C, H, W) of a latent.
    indices: the address of each sample's noise, 0..N-1 unless given; a rank passes those of its
    share. The number of calls of predict depends on N and cfg alone, so ranks with equal N stay in
    step. Picture n is the same in any split, to float rounding of predict.
    Raises SamplingError if the sampler does not fit the objective or a label is out of range.
    """
    check(cfg, objective)
    labels = labels.detach().cpu()
    _check_labels(labels, null)
    addresses = range(len(labels)) if indices is None else indices
    if len(addresses) != len(labels):
        raise SamplingError(
            f"{len(addresses)} indices came for {len(labels)} labels; give one each"
        )
    done = []
    for start in range(0, len(labels), cfg.batch):
        part = slice(start, start + cfg.batch)
        noise_at = _noise_at(seed, addresses[part], shape, device)
        denoise = _guided(predict, objective, labels[part].to(device), null, shape[0], cfg)
        done.append(_integrate(denoise, objective, cfg, noise_at))
    return torch.cat(done) if done else torch.empty(0, *shape, device=device)


def _check_labels(labels: Tensor, null: int) -> None:
    wrong = labels[(labels < 0) | (labels > null)]
    if len(wrong):
        raise SamplingError(
            f"label {int(wrong[0])} came; expected 0..{null - 1}, or {null} for no class; "
            "change the labels"
        )


def _noise_at(
    seed: int, addresses: Sequence[int], shape: Sequence[int], device: torch.device | str
) -> NoiseAt:
    def noise_at(turn: int) -> Tensor:
        return draw(seed, turn, addresses, shape, stream=Stream.SAMPLE).noise.to(device)

    return noise_at


def _guided(
    predict: Predict,
    objective: Objective,
    cond: Tensor,
    null: int,
    channels: int,
    cfg: SampleConfig,
) -> Denoise:
    """Classifier-free guidance, as one pass of twice the batch.

    Channels that are not guided, and the variance, are the conditional ones.
    Source: Ho and Salimans 2022, Eq. 6 with guidance = 1 + w.
    """
    nobody = torch.full_like(cond, null)

    def alone(label: Tensor) -> Denoise:
        return lambda x_t, t: predict(x_t, objective.embed(t), label).float()

    def doubled(x_t: Tensor, t: Tensor) -> Tensor:
        pred = predict(
            x_t.repeat(2, 1, 1, 1), objective.embed(t).repeat(2), torch.cat([cond, nobody])
        )
        given, free = pred.float().chunk(2)
        k = channels if cfg.guidance_channels == "all" else min(cfg.guidance_channels, channels)
        guided = free[:, :k] + cfg.guidance * (given[:, :k] - free[:, :k])
        return torch.cat([guided, given[:, k:]], dim=1)

    if cfg.guidance == 1.0:
        return alone(cond)
    if cfg.guidance == 0.0 and cfg.guidance_channels == "all":
        return alone(nobody)
    return doubled


def _integrate(
    denoise: Denoise, objective: Objective, cfg: SampleConfig, noise_at: NoiseAt
) -> Tensor:
    if isinstance(objective, DDPM):
        if cfg.sampler == "ddpm":
            return _ddpm(denoise, objective, cfg.steps, noise_at)
        return _ddim(denoise, objective, cfg.steps, cfg.eta, noise_at)
    assert isinstance(objective, Flow)
    return _flow(denoise, objective, cfg.steps, noise_at, heun=cfg.sampler == "heun")


def respaced(timesteps: int, steps: int) -> list[int]:
    """The timesteps visited, rising, evenly spread up to the last.

    Source: improved DDPM, Sec. 4. One step alone visits the last, not 0.
    """
    return [int(t) for t in np.round(np.linspace(timesteps - 1, 0, steps))][::-1]


def _ddpm(denoise: Denoise, objective: DDPM, steps: int, noise_at: NoiseAt) -> Tensor:
    """Ancestral sampling with the learned variance; the net sees the full chain's timesteps.

    Source: DDPM, Alg. 2; improved DDPM, Eq. 15 and Sec. 4. Latents have no range to be clipped to.
    """
    visited = respaced(objective.timesteps, steps)
    chain = diffusion(objective.chain().alphas_bar[visited])
    x_t = noise_at(0)
    for i in reversed(range(steps)):
        eps, v = denoise(x_t, _fill(x_t, visited[i])).chunk(2, dim=1)
        x = _clean(x_t, eps, float(chain.alphas_bar[i]))
        x_t = float(chain.mean_x[i]) * x + float(chain.mean_x_t[i]) * x_t
        if i > 0:
            f = (v + 1) / 2
            log_variance = f * float(chain.log_beta[i]) + (1 - f) * float(chain.log_posterior[i])
            x_t = x_t + torch.exp(log_variance / 2) * noise_at(steps - i)
    return x_t


def _ddim(denoise: Denoise, objective: DDPM, steps: int, eta: float, noise_at: NoiseAt) -> Tensor:
    """Source: DDIM, Eq. 12 and 16; the timesteps are spread as for ddpm, the last one included."""
    visited = respaced(objective.timesteps, steps)
    kept = [1.0, *map(float, objective.chain().alphas_bar[visited])]
    x_t = noise_at(0)
    for i in reversed(range(steps)):
        before, now = kept[i], kept[i + 1]
        eps = denoise(x_t, _fill(x_t, visited[i]))[:, : x_t.shape[1]]
        std = eta * math.sqrt((1 - before) / (1 - now) * (1 - now / before))
        x = _clean(x_t, eps, now)
        x_t = math.sqrt(before) * x + math.sqrt(1 - before - std**2) * eps
        if std > 0:
            x_t = x_t + std * noise_at(steps - i)
    return x_t


def _flow(
    denoise: Denoise, objective: Flow, steps: int, noise_at: NoiseAt, *, heun: bool
) -> Tensor:
    """Euler or Heun from t = 1 to 0 over a grid moved by the objective's shift.

    Source: EDM, Alg. 1 (Heun, its last move without correction).
    """
    grid = objective.shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()
    x_t = noise_at(0)
    channels = x_t.shape[1]
    for t, after in zip(grid[:-1], grid[1:], strict=True):
        velocity = denoise(x_t, _fill(x_t, t))[:, :channels]
        moved = x_t + (after - t) * velocity
        # why: no correction at t = 0, which training hardly visits; the order stays 2.
        if heun and after > 0:
            there = denoise(moved, _fill(x_t, after))[:, :channels]
            moved = x_t + (after - t) / 2 * (velocity + there)
        x_t = moved
    return x_t


def _clean(x_t: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """The estimate of x that this estimate of the noise implies."""
    return (x_t - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)


def _fill(x_t: Tensor, t: int | float) -> Tensor:
    """(B,): int64 for a timestep, float32 for a time."""
    dtype = torch.int64 if isinstance(t, int) else torch.float32
    return torch.full((len(x_t),), t, dtype=dtype, device=x_t.device)
