"""Moving averages of the weights: fp32, in the same pieces as the masters, moved in the same pass.

The main one and others of a half-life forget exponentially; those of a power function grow with the
run, and averages of any length are rebuilt from them afterwards (`averaging`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator
from torch import Tensor

from parallel.backend import Backend
from parallel.shards import Piece
from pretrain import averaging

MAIN = "ema"  # name of the average that is sampled from and scored


class EMAConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    decay: float = Field(0.9999, ge=0.0, lt=1.0)  # share of the old average kept a step
    warmup: bool = True  # decay rises as (1+step)/(10+step), for short runs; of half-lives too
    half_lives: tuple[PositiveFloat, ...] = ()  # steps; one more average each
    power: tuple[float, ...] = ()  # relative standard deviations of power functions; one more each

    @field_validator("half_lives", "power")
    @classmethod
    def _names_differ(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        names = [f"{value:g}" for value in values]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} came twice; give each average once")
        return values

    @field_validator("power")
    @classmethod
    def _widths_exist(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        for sigma in values:
            averaging.gamma(sigma)
        return values

    @property
    def decays(self) -> dict[str, float]:
        """Share kept a step of each exponential average, by name."""
        return {MAIN: self.decay} | {f"ema_h{h:g}": 0.5 ** (1.0 / h) for h in self.half_lives}

    @property
    def exponents(self) -> dict[str, float]:
        """γ of each power function, by name."""
        return {f"ema_p{sigma:g}": averaging.gamma(sigma) for sigma in self.power}

    @property
    def names(self) -> tuple[str, ...]:
        """Of all averages, as in a checkpoint: NAME.PARAMETER."""
        return (*self.decays, *self.exponents)


class EMA:
    """Averages of a model's parameters, a piece each."""

    def __init__(self, cfg: EMAConfig, backend: Backend) -> None:
        self._cfg = cfg
        self._backend = backend
        self._averages = {
            name: {n: piece.values.clone() for n, piece in backend.pieces.items()}
            for name in cfg.names
        }

    def state(self) -> dict[str, Piece]:
        """The averages by NAME.PARAMETER; live."""
        pieces = self._backend.pieces
        return {
            f"{name}.{n}": replace(pieces[n], values=part)
            for name, average in self._averages.items()
            for n, part in average.items()
        }

    @torch.no_grad()
    def update(self, step: int, updates: Tensor, skip: Tensor) -> None:
        """Moves the averages towards the weights.

        updates: (), those the optimizer has made, this one included. skip: (), true leaves all
        averages bit-identical.
        """
        warm = (1 + step) / (10 + step) if self._cfg.warmup else 1.0
        for name, decay in self._cfg.decays.items():
            self._move(self._averages[name], 1.0 - min(decay, warm), skip)
        for name, exponent in self._cfg.exponents.items():
            # why: clamped for a first step that is left out, after 0 updates.
            share = 1.0 - averaging.beta(updates.double().clamp(min=1.0), exponent)
            self._move(self._averages[name], share, skip)

    def restart(self) -> None:
        """All averages are the weights."""
        for average in self._averages.values():
            for name, part in average.items():
                part.copy_(self._backend.pieces[name].values)

    def _move(self, average: dict[str, Tensor], share: float | Tensor, skip: Tensor) -> None:
        """share: of the weights; a tensor, (), is not waited for."""
        held = [name for name, part in average.items() if part.numel()]
        if not held:
            return
        old = [average[name] for name in held]
        new = [self._backend.pieces[name].values for name in held]
        if isinstance(share, Tensor):
            # sync: only where masters are offloaded: share comes to the host, and skip below.
            moved = torch._foreach_lerp(old, new, [share.to(old[0])] * len(held))
        else:
            moved = torch._foreach_lerp(old, new, share)
        for part, value in zip(old, moved, strict=True):
            # why: not a lerp by 0, which would turn a −0.0 into +0.0.
            torch.where(skip.to(part.device), part, value, out=part)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model computes with the main average; outside, its weights are as before."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self._averages[MAIN].items():
            weight = self._backend.pieces[name].values
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
        self._backend.publish()
