"""Exponential moving average of the weights: fp32, sharded as the weights are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from parallel.fsdp import regather
from parallel.shards import like, local


class EMAConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    decay: float = Field(0.9999, ge=0.0, lt=1.0)  # share of the old average kept a step
    warmup: bool = True  # decay rises as (1+step)/(10+step), for short runs


class EMA:
    """Averages of a model's parameters, one tensor a parameter, same placement."""

    def __init__(self, cfg: EMAConfig, model: nn.Module) -> None:
        self._cfg = cfg
        self._model = model
        self._average = {name: local(p).clone() for name, p in model.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name, sharded as the weights; live."""
        weights = dict(self._model.named_parameters())
        return {name: like(part, weights[name]) for name, part in self._average.items()}

    @torch.no_grad()
    def update(self, step: int, skip: Tensor) -> None:
        """Moves the average towards the weights; skip: (), true leaves it bit-identical."""
        decay = self._cfg.decay
        if self._cfg.warmup:
            decay = min(decay, (1 + step) / (10 + step))
        old = [part for part in self._average.values() if part.numel()]
        new = [part for part in map(local, self._model.parameters()) if part.numel()]
        moved = torch._foreach_lerp(old, new, 1.0 - decay)
        for average, value in zip(old, moved, strict=True):
            # why: not a lerp by 0, which would turn a −0.0 into +0.0.
            torch.where(skip, average, value, out=average)

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
        regather(self._model)  # why: after a forward alone the model shows its gathered weights
        for average, parameter in zip(
            self._average.values(), self._model.parameters(), strict=True
        ):
            weight = local(parameter)
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
