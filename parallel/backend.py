"""The face of both engines: a model whose fp32 masters are cut over ranks, and how they move.

FSDP2 (`parallel.fsdp`) and DeepSpeed ZeRO (`parallel.deepspeed`) stand behind it. Loss scaling,
clipping, the guard, the schedule, the optimizer and the averages are not here: they see pieces.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from parallel.shards import Piece


class Backend(Protocol):
    """Every rank calls every method, in the same order."""

    @property
    def model(self) -> nn.Module:
        """To be called in forward."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """Float32 masters by logical name, the same storage for ever."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds gradients; on the last micro-batch they are reduced by SUM over all data ranks."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Reduced float32 gradients, each flat as its piece; from the last backward to `step`."""
        ...

    def step(self, update: Callable[[], None]) -> None:
        """Runs `update`, which changes pieces in place; drops gradients and publishes."""
        ...

    def forget(self) -> None:
        """Drops gradients without an update, as if there had been no backward."""
        ...

    def publish(self) -> None:
        """Pieces were changed: the next forward computes with them."""
        ...
