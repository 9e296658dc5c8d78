"""AdamW on sharded fp32 masters: an update that can be left out on the device, bit for bit.

The schedule is a function of the step and lives elsewhere; this room only applies its value. State
exists before the first step, so that a checkpoint loads in place.
"""

from collections.abc import Iterable

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.optim.adamw import adamw

from parallel.shards import like, local


class OptimConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: PositiveFloat = 1e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the two moments
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0  # on matrices and kernels only


class AdamW:
    """Fused AdamW over this rank's shards. Source: Loshchilov and Hutter 2019, Alg. 2."""

    def __init__(self, cfg: OptimConfig, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._cfg = cfg
        self._named = dict(named)
        shards = {name: local(p) for name, p in self._named.items()}
        self._first = {name: torch.zeros_like(shard) for name, shard in shards.items()}
        self._second = {name: torch.zeros_like(shard) for name, shard in shards.items()}
        # why: one count a parameter is what the fused kernel wants; they are always equal.
        self._updates = {
            name: torch.zeros((), dtype=torch.float32, device=shard.device)
            for name, shard in shards.items()
        }
        held = [name for name, shard in shards.items() if shard.numel()]
        self._groups = [
            ([n for n in held if self._named[n].ndim >= 2], cfg.weight_decay),
            ([n for n in held if self._named[n].ndim < 2], 0.0),
        ]

    @torch.no_grad()
    def step(self, factor: float, divisor: Tensor, skip: Tensor) -> float:
        """Updates the parameters; returns the learning rate used.

        factor: of the peak learning rate. divisor: (), gradients are divided by it (clipping).
        skip: (), true leaves parameters, moments and the step count bit-identical.
        """
        lr = self._cfg.lr * factor
        for names, decay in self._groups:
            if not names:
                continue
            # perf: scaling and skipping inside the fused kernel: no extra pass over the gradients.
            adamw(
                [local(self._named[name]) for name in names],
                [self._gradient(name) for name in names],
                [self._first[name] for name in names],
                [self._second[name] for name in names],
                [],
                [self._updates[name] for name in names],
                fused=True,
                grad_scale=divisor.float(),
                found_inf=skip.float(),
                amsgrad=False,
                beta1=self._cfg.betas[0],
                beta2=self._cfg.betas[1],
                lr=lr,
                weight_decay=decay,
                eps=self._cfg.eps,
                maximize=False,
            )
        return lr

    def _gradient(self, name: str) -> Tensor:
        gradient = self._named[name].grad
        assert gradient is not None, f"{name} got no gradient: it is not part of the loss"
        return local(gradient)

    def zero_grad(self) -> None:
        for parameter in self._named.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Live tensors by `moment.parameter`, and the one step count all parameters share."""
        tensors = {"updates": next(iter(self._updates.values()))}
        for name, parameter in self._named.items():
            tensors[f"exp_avg.{name}"] = like(self._first[name], parameter)
            tensors[f"exp_avg_sq.{name}"] = like(self._second[name], parameter)
        return tensors

    def loaded(self) -> None:
        """Spreads the step count over all parameters after `state()` was filled in place."""
        count, *others = self._updates.values()
        for other in others:
            other.copy_(count)
