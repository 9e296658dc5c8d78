"""Exponential moving average of the weights: fp32, in the same pieces as the masters."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from parallel.backend import Backend
from parallel.shards import Piece


class EMAConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    decay: float = Field(0.9999, ge=0.0, lt=1.0)  # share of the old average kept a step
    warmup: bool = True  # decay rises as (1+step)/(10+step), for short runs


class EMA:
    """Averages of a model's parameters, a piece each."""

    def __init__(self, cfg: EMAConfig, backend: Backend) -> None:
        self._cfg = cfg
        self._backend = backend
        self._average = {name: piece.values.clone() for name, piece in backend.pieces.items()}

    def state(self) -> dict[str, Piece]:
        """The averages by parameter name; live."""
        pieces = self._backend.pieces
        return {n: replace(pieces[n], values=part) for n, part in self._average.items()}

    @torch.no_grad()
    def update(self, step: int, skip: Tensor) -> None:
        """Moves the average towards the weights; skip: (), true leaves it bit-identical."""
        decay = self._cfg.decay
        if self._cfg.warmup:
            decay = min(decay, (1 + step) / (10 + step))
        held = [name for name, part in self._average.items() if part.numel()]
        old = [self._average[name] for name in held]
        new = [self._backend.pieces[name].values for name in held]
        moved = torch._foreach_lerp(old, new, 1.0 - decay)
        for average, value in zip(old, moved, strict=True):
            # why: not a lerp by 0, which would turn a −0.0 into +0.0.
            torch.where(skip.to(average.device), average, value, out=average)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model computes with the average; outside, its weights are as before."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, average in self._average.items():
            weight = self._backend.pieces[name].values
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
        self._backend.publish()
