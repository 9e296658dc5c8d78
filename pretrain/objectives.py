"""Training objectives: what the net is asked to predict, and how the answer is scored.

Pure arithmetic on (x, noise, t, pred). Nothing here draws a random number, knows the step, or
reduces over the batch. Papers with other signs are converted here: t rises with the noise, data is
t = 0.

    t = objective.time(u); x_t = objective.corrupt(x, noise, t)
    loss = objective.loss(model(x_t, objective.embed(t), cond), x, noise, t)     # (B,)
"""

import math
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

Table = NDArray[np.float64]

# why: 8-bit pixels in [-1, 1] have bins 2/255 wide; the published loss keeps it for latents.
HALF_BIN = 1.0 / 255.0


class Objective(Protocol):
    """What the engine and the samplers may ask of an objective."""

    def time(self, u: Tensor) -> Tensor:
        """u: (B,) in [0, 1), uniform -> t: (B,), distributed as the objective trains."""
        ...

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x, noise: (B, C, H, W); t: (B,) -> x_t: (B, C, H, W)."""
        ...

    def embed(self, t: Tensor) -> Tensor:
        """t: (B,) -> (B,) float32 in the units of the time sinusoid."""
        ...

    def loss(self, pred: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """pred: (B, C or 2C, H, W); x, noise: (B, C, H, W); t: (B,) -> (B,) float32."""
        ...

    def fraction(self, t: Tensor) -> Tensor:
        """t: (B,) -> (B,) float32 in [0, 1]: how far towards pure noise."""
        ...

    def pred_channels(self, channels: int) -> int:
        """Channels the net must give for latents of so many channels."""
        ...


class Diffusion(NamedTuple):
    """Tables of a Gaussian diffusion, (T,) each. Source: DDPM, Eq. 4-7; improved DDPM, Eq. 15."""

    alphas_bar: Table  # share of the data's variance left at t
    log_beta: Table  # upper bound of the reverse step's log-variance
    log_posterior: Table  # lower bound; entry 0 repeats entry 1, where the variance would be 0
    mean_x: Table  # posterior mean = mean_x * x + mean_x_t * x_t
    mean_x_t: Table


def diffusion(alphas_bar: Table) -> Diffusion:
    """The tables of the chain with these alphas_bar, which may be a subset of a longer chain's."""
    before = np.append(1.0, alphas_bar[:-1])
    alphas = alphas_bar / before
    betas = 1.0 - alphas
    variance = betas * (1.0 - before) / (1.0 - alphas_bar)
    variance[0] = variance[1] if len(variance) > 1 else betas[0]
    return Diffusion(
        alphas_bar=alphas_bar,
        log_beta=np.log(betas),
        log_posterior=np.log(variance),
        mean_x=betas * np.sqrt(before) / (1.0 - alphas_bar),
        mean_x_t=(1.0 - before) * np.sqrt(alphas) / (1.0 - alphas_bar),
    )


@lru_cache(maxsize=8)
def _linear_chain(timesteps: int, beta_first: float, beta_last: float) -> Diffusion:
    return diffusion(
        np.cumprod(1.0 - np.linspace(beta_first, beta_last, timesteps), dtype=np.float64)
    )


@lru_cache(maxsize=16)
def _on_device(timesteps: int, first: float, last: float, device: torch.device) -> Tensor:
    """(T, 5) float64: sqrt(alphas_bar), sqrt(1 - alphas_bar), log_beta, log_posterior, mean_x."""
    chain = _linear_chain(timesteps, first, last)
    signal, spread = np.sqrt(chain.alphas_bar), np.sqrt(1.0 - chain.alphas_bar)
    rows = [signal, spread, chain.log_beta, chain.log_posterior, chain.mean_x]
    return torch.from_numpy(np.stack(rows, axis=1)).to(device)


class DDPM(BaseModel):
    """Noise prediction with a learned variance. t: (B,) int64 in 0..timesteps-1.

    Source: DDPM, Eq. 14; improved DDPM, Eq. 15-16 (hybrid loss) as trained by DiT: the bound is in
    bits, is not divided by the number of timesteps, and does not reach the noise estimate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
    kind: Literal["ddpm"] = "ddpm"
    timesteps: int = Field(1000, ge=2)  # length of the chain
    beta_first: float = Field(1e-4, gt=0.0, lt=1.0)  # variance added at t = 0
    beta_last: float = Field(2e-2, gt=0.0, lt=1.0)  # variance added at the last t; linear between

    def chain(self) -> Diffusion:
        """The tables of the whole chain."""
        return _linear_chain(self.timesteps, self.beta_first, self.beta_last)

    def pred_channels(self, channels: int) -> int:
        return 2 * channels

    def time(self, u: Tensor) -> Tensor:
        return (u.double() * self.timesteps).long()

    def embed(self, t: Tensor) -> Tensor:
        return t.float()

    def fraction(self, t: Tensor) -> Tensor:
        return t.float() / self.timesteps

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        signal, spread, *_ = self._rows(t, x)
        return signal.float() * x + spread.float() * noise

    def loss(self, pred: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of the noise plus the variational bound in bits, averaged over dims.

        pred: (B, 2C, H, W): C of noise, then C of v, where f = (v + 1) / 2 and
        log-variance = f log_beta + (1 - f) log_posterior.
        Raises ValueError if it has other shapes.
        """
        _require(pred, x, (2,), "DDPM predicts the noise and its variance")
        # why: float64. The decoder term subtracts two tails of a normal, of which float32 leaves
        # nothing; beside the net these few element-wise operations cost nothing.
        pred, x, noise = pred.double(), x.double(), noise.double()
        eps, v = pred.chunk(2, dim=1)
        signal, spread, log_beta, log_posterior, mean_x = self._rows(t, x)
        f = (v + 1) / 2
        log_variance = f * log_beta + (1 - f) * log_posterior
        missed = spread / signal * (eps.detach() - noise)  # x minus the estimate of x
        bound = _kl(mean_x * missed, log_posterior, log_variance)
        decoder = -_log_bin(x, missed, log_variance / 2)
        bits = torch.where(t == 0, _mean(decoder), _mean(bound)) / math.log(2.0)
        return (_mean((eps - noise).square()) + bits).float()

    def _rows(self, t: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        table = _on_device(self.timesteps, self.beta_first, self.beta_last, like.device)
        return tuple(_column(values, like) for values in table[t].unbind(dim=1))


class Flow(BaseModel):
    """Rectified flow: x_t = (1 - t) x + t noise; the net predicts noise - x. t: (B,) in [0, 1].

    Source: Flow Straight and Fast, Eq. 1; logit-normal time: Stable Diffusion 3, Sec. 3.1; shift:
    Sec. 5.3.2. DiT-MoE as published: law="logit_normal", time_scale=1, and a net of 2C channels
    whose second half is unused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
    kind: Literal["flow"] = "flow"
    law: Literal["uniform", "logit_normal"] = "uniform"  # distribution of t in training
    loc: float = 0.0  # mean of logit(t); logit_normal only
    scale: float = Field(1.0, gt=0.0)  # standard deviation of logit(t); logit_normal only
    shift: float = Field(1.0, gt=0.0)  # > 1 moves t towards the noise, in training and in sampling
    time_scale: float = Field(1000.0, gt=0.0)  # sinusoid units per unit of t

    @model_validator(mode="after")
    def _no_idle_fields(self) -> "Flow":
        if self.law == "uniform" and (self.loc, self.scale) != (0.0, 1.0):
            raise ValueError(
                f"loc={self.loc} scale={self.scale} came with law='uniform', which has neither; "
                "set law='logit_normal' or leave them out"
            )
        return self

    def pred_channels(self, channels: int) -> int:
        return channels

    def time(self, u: Tensor) -> Tensor:
        t = u.double()
        if self.law == "logit_normal":
            t = torch.sigmoid(self.loc + self.scale * torch.special.ndtri(t))
        return self.shifted(t).float()

    def shifted(self, t: Tensor) -> Tensor:
        """t: any shape in [0, 1]; 0 and 1 stay. Source: Stable Diffusion 3, Eq. 23."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def embed(self, t: Tensor) -> Tensor:
        return t.float() * self.time_scale

    def fraction(self, t: Tensor) -> Tensor:
        return t.float()

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        t = _column(t, x)
        return (1 - t) * x + t * noise

    def loss(self, pred: Tensor, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of the velocity over dims.

        pred: (B, C, H, W), or (B, 2C, H, W) of which the second C are unused.
        Raises ValueError if it has other shapes.
        """
        _require(pred, x, (1, 2), "flow predicts the velocity")
        velocity = noise.float() - x.float()
        return _mean((pred[:, : x.shape[1]].float() - velocity).square())


ObjectiveConfig = Annotated[DDPM | Flow, Field(discriminator="kind")]


def _require(pred: Tensor, x: Tensor, factors: tuple[int, ...], why: str) -> None:
    expected = [(x.shape[0], f * x.shape[1], *x.shape[2:]) for f in factors]
    if tuple(pred.shape) not in expected:
        shapes = " or ".join(map(str, expected))
        raise ValueError(
            f"pred has shape {tuple(pred.shape)}; expected {shapes} for latents "
            f"{tuple(x.shape)}: {why}; set the model's learn_sigma (true doubles its channels) "
            "or choose another objective"
        )


def _column(values: Tensor, like: Tensor) -> Tensor:
    """values: (B,) -> (B, 1, 1, 1), as many ones as `like` has further dims."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _mean(values: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return values.flatten(1).mean(1)


def _kl(apart: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) in nats of normals with these log-variances and means `apart` from each other."""
    return 0.5 * (log_p - log_q - 1 + torch.exp(log_q - log_p) + apart.square() * torch.exp(-log_p))


def _log_bin(x: Tensor, missed: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of the 8-bit bin around x under a normal around x - missed.

    The outer two bins are open. Source: DDPM, Eq. 13, with tanh for the normal CDF.
    """
    scale = torch.exp(-log_std)
    below, above = _cdf(scale * (missed - HALF_BIN)), _cdf(scale * (missed + HALF_BIN))
    inner = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inner).clamp(min=1e-12).log()


def _cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
