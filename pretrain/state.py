"""TrainState: what survives a restart, and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.cursor import Cursor, Stretch
from parallel.backend import Backend
from parallel.fp8.scaling import Scaling
from parallel.shards import Piece
from pretrain.ema import EMA, EMAConfig
from pretrain.guard import Guard, GuardConfig
from pretrain.models.build import build
from pretrain.models.init import Filler
from pretrain.models.mup import factors
from pretrain.optim import AdamW, OptimConfig


@dataclass
class TrainState:
    """Model, optimizer, averages, guard, and the clock that everything else is a function of."""

    backend: Backend
    optimizer: AdamW
    ema: EMA
    guard: Guard
    fp8: Scaling
    seed: int
    step: int = 0  # optimizer updates asked for, skipped ones included
    skipped: int = 0  # of those, updates left out
    skipped_in_a_row: int = 0  # up to now
    skipped_from: int = 0  # position of the first of the row; of nothing while there is no row
    cursor: Cursor = Cursor()  # place in the data after `step`

    @staticmethod
    def new(
        backend: Backend, optim: OptimConfig, ema: EMAConfig, guard: GuardConfig, seed: int
    ) -> "TrainState":
        cfg: Any = backend.model.cfg
        optimizer = AdamW(optim, backend.pieces, factors(cfg))
        scaling = Scaling(backend.model, backend.device)
        watch = Guard(guard, backend.device)
        return TrainState(backend, optimizer, EMA(ema, backend), watch, scaling, seed)

    @property
    def model(self) -> nn.Module:
        return self.backend.model

    def advance(self, cursor: Cursor) -> None:
        self.step += 1
        self.cursor = cursor

    def pass_over(self, stretch: Stretch) -> None:
        """The data in this stretch will not be read; the row of skips that it caused is over."""
        self.cursor = self.cursor.pass_over(stretch)
        self.skipped_in_a_row = self.skipped_from = 0

    def tensors(self) -> dict[str, Tensor | Piece]:
        """Live values by layout-free name; a checkpoint is written from and loaded into them."""
        weights: dict[str, Tensor | Piece] = dict(self.backend.pieces)
        weights |= persistent_buffers(self.model)
        return (
            {f"model.{name}": tensor for name, tensor in weights.items()}
            | self.ema.state()
            | {f"optim.{name}": tensor for name, tensor in self.optimizer.state().items()}
            | {"guard.statistics": self.guard.statistics}
            | self.fp8.tensors()
        )

    def absent(self, stored: Mapping[str, Sequence[int]]) -> set[str]:
        """Names that a checkpoint may leave out and does; these begin anew. stored: its shapes."""
        return self.fp8.absent(stored)

    def scalars(self) -> dict[str, Any]:
        """All the rest, as JSON holds it."""
        return {
            "step": self.step,
            "seed": self.seed,
            "position": self.cursor.position,
            "passed_over": [list(stretch) for stretch in self.cursor.passed_over],
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_from": self.skipped_from,
        } | ({"fp8": self.fp8.scalars()} if self.fp8.products else {})

    def loaded(self, scalars: dict[str, Any]) -> None:
        """Takes the clock of a checkpoint whose tensors were loaded in place."""
        self.step = scalars["step"]
        passed_over = tuple((first, last) for first, last in scalars["passed_over"])
        self.cursor = Cursor(scalars["position"], passed_over)
        self.skipped = scalars["skipped"]
        self.skipped_in_a_row = scalars["skipped_in_a_row"]
        self.skipped_from = scalars["skipped_from"]
        self.fp8.take(scalars.get("fp8", {}))
        self.optimizer.loaded()
        self.backend.publish()

    @torch.no_grad()
    def restart(self) -> None:
        """Everything as before the first step, whatever stood here."""
        cfg: Any = self.model.cfg
        with torch.device("meta"):
            # why: uncut, so that its inits and boxes are those of logical tensors.
            fill = Filler(build(cfg), self.seed, cfg.zero_init_std)
        for name, piece in self.backend.pieces.items():
            for box, place in piece.extent.boxes():
                fill.fill(name, piece.values[place : place + box.numel].view(box.sizes), box)
        for name, buffer in persistent_buffers(self.model).items():
            fill(name, buffer)
        self.ema.restart()
        self.optimizer.restart()
        self.guard.restart()
        self.fp8.restart()
        self.step = self.skipped = self.skipped_in_a_row = self.skipped_from = 0
        self.cursor = Cursor()
        self.backend.publish()


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state dict holds (the balance biases), not tables that are computed."""
    kept = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}
