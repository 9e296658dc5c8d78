"""TrainState: what survives a restart, and nothing else."""

from dataclasses import dataclass

from torch import Tensor, nn

from data_pipeline.cursor import Cursor
from parallel.backend import Backend
from parallel.shards import Piece
from pretrain.ema import EMA, EMAConfig
from pretrain.optim import AdamW, OptimConfig


@dataclass
class TrainState:
    """Model, optimizer, average, and the clock that everything else is a function of."""

    backend: Backend
    optimizer: AdamW
    ema: EMA
    seed: int
    step: int = 0  # optimizer updates asked for, skipped ones included
    skipped: int = 0  # of those, updates left out
    skipped_in_a_row: int = 0  # up to now
    cursor: Cursor = Cursor()  # place in the data after `step`

    @staticmethod
    def new(backend: Backend, optim: OptimConfig, ema: EMAConfig, seed: int) -> "TrainState":
        return TrainState(backend, AdamW(optim, backend.pieces), EMA(ema, backend), seed)

    @property
    def model(self) -> nn.Module:
        return self.backend.model

    def advance(self, cursor: Cursor) -> None:
        self.step += 1
        self.cursor = cursor

    def tensors(self) -> dict[str, Tensor | Piece]:
        """Live values by layout-free name; a checkpoint is written from and loaded into them."""
        weights: dict[str, Tensor | Piece] = dict(self.backend.pieces)
        weights |= persistent_buffers(self.model)
        return (
            {f"model.{name}": tensor for name, tensor in weights.items()}
            | {f"ema.{name}": tensor for name, tensor in self.ema.state().items()}
            | {f"optim.{name}": tensor for name, tensor in self.optimizer.state().items()}
        )

    def scalars(self) -> dict[str, int]:
        return {
            "step": self.step,
            "seed": self.seed,
            "position": self.cursor.position,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def loaded(self, scalars: dict[str, int]) -> None:
        """Takes the clock of a checkpoint whose tensors were loaded in place."""
        self.step = scalars["step"]
        self.cursor = Cursor(scalars["position"])
        self.skipped = scalars["skipped"]
        self.skipped_in_a_row = scalars["skipped_in_a_row"]
        self.optimizer.loaded()
        self.backend.publish()


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state dict holds (the balance biases), not tables that are computed."""
    kept = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}
