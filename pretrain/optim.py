"""AdamW on pieces of fp32 masters: an update that can be left out on the device, bit for bit.

The schedule is a function of the step and lives elsewhere; this room only applies its value. State
exists before the first step, so that a checkpoint loads in place.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.optim.adamw import adamw

from parallel.shards import Piece


class OptimConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    lr: PositiveFloat = 1e-4  # peak learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the two moments
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0  # on matrices and kernels only


class AdamW:
    """Fused AdamW over this rank's pieces. Source: Loshchilov and Hutter 2019, Alg. 2."""

    def __init__(
        self,
        cfg: OptimConfig,
        pieces: Mapping[str, Piece],
        factors: Mapping[str, tuple[float, float]],
    ) -> None:
        """factors: what multiplies learning rate and weight decay, by name of the parameter."""
        self._cfg = cfg
        self._pieces = pieces
        values = {name: piece.values for name, piece in pieces.items()}
        self._first = {name: torch.zeros_like(value) for name, value in values.items()}
        self._second = {name: torch.zeros_like(value) for name, value in values.items()}
        held = [name for name, value in values.items() if value.numel()]
        # why: one count a parameter is what the fused kernel wants; they are always equal. The one
        # that is saved counts for itself, because a rank may hold nothing of any one parameter.
        self._updates = {
            name: torch.zeros((), dtype=torch.float32, device=values[name].device) for name in held
        }
        self._count = torch.zeros((), dtype=torch.float32)
        # perf: one fused call for all parameters of the same factors.
        groups: dict[tuple[float, float, bool], list[str]] = {}
        for name in held:
            matrix = len(pieces[name].extent.box.shape) >= 2
            groups.setdefault((*factors[name], matrix), []).append(name)
        self._groups = [
            (names, rate, cfg.weight_decay * decay if matrix else 0.0)
            for (rate, decay, matrix), names in groups.items()
        ]

    @torch.no_grad()
    def step(
        self, gradients: Mapping[str, Tensor], factor: float, divisor: Tensor, skip: Tensor
    ) -> float:
        """Updates the pieces; returns the learning rate used, before factors.

        gradients: flat, by name, as the pieces. factor: of the peak learning rate. divisor: (),
        gradients are divided by it (clipping). skip: (), true leaves parameters, moments and the
        step count bit-identical.
        """
        lr = self._cfg.lr * factor
        self._count = self._count.to(skip.device) + (~skip).float()
        for names, rate, decay in self._groups:
            device = self._pieces[names[0]].values.device
            # perf: scaling and skipping inside the fused kernel: no extra pass over the gradients.
            # sync: only where masters are offloaded: divisor and skip come to the host.
            adamw(
                [self._pieces[name].values for name in names],
                [gradients[name] for name in names],
                [self._first[name] for name in names],
                [self._second[name] for name in names],
                [],
                [self._updates[name] for name in names],
                fused=True,
                grad_scale=divisor.float().to(device),
                found_inf=skip.float().to(device),
                amsgrad=False,
                beta1=self._cfg.betas[0],
                beta2=self._cfg.betas[1],
                lr=lr * rate,
                weight_decay=decay,
                eps=self._cfg.eps,
                maximize=False,
            )
        return lr

    @property
    def updates(self) -> Tensor:
        """How many updates were made, (), float32; steps left out are not among them."""
        return self._count

    def state(self) -> dict[str, Tensor | Piece]:
        """Live tensors by `moment.parameter`, and the one step count all parameters share."""
        state: dict[str, Tensor | Piece] = {"updates": self._count}
        for name, piece in self._pieces.items():
            state[f"exp_avg.{name}"] = replace(piece, values=self._first[name])
            state[f"exp_avg_sq.{name}"] = replace(piece, values=self._second[name])
        return state

    def restart(self) -> None:
        """As before the first update."""
        for values in (*self._first.values(), *self._second.values(), self._count):
            values.zero_()
        self.loaded()

    def loaded(self) -> None:
        """Spreads the step count over all parameters after `state()` was filled in place."""
        for updates in self._updates.values():
            updates.copy_(self._count)
