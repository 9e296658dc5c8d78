"""What a loader hands to a training step: latents, labels and where they belong. Never changed."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch. B is this rank's number of samples."""

    x: Tensor  # (B, C, H, W) float32, normalised latents
    labels: Tensor  # (B,) int64
    slots: np.ndarray  # (B,) int64, place in the global batch; stays on the host
    samples: np.ndarray  # (B,) int64, sample ids in the split; stays on the host

    def __post_init__(self) -> None:
        assert self.x.ndim == 4, f"x must be (B, C, H, W), got {tuple(self.x.shape)}"
        sizes = {len(self.x), len(self.labels), len(self.slots), len(self.samples)}
        assert len(sizes) == 1, f"x, labels, slots and samples differ in length: {sizes}"

    def __len__(self) -> int:
        return len(self.slots)

    def split(self, n: int) -> "list[Batch]":
        """n equal contiguous pieces, in order (micro-batches).

        Raises ValueError if the batch cannot be cut into n equal pieces.
        """
        if n < 1 or len(self) % n:
            raise ValueError(
                f"a batch of {len(self)} samples cannot be cut into {n} equal micro-batches; "
                f"choose accum so that it divides {len(self)}."
            )
        size = len(self) // n
        cuts = [slice(i * size, (i + 1) * size) for i in range(n)]
        return [Batch(self.x[c], self.labels[c], self.slots[c], self.samples[c]) for c in cuts]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device; slots and samples stay host arrays."""
        return Batch(
            sent(self.x, device),
            sent(self.labels, device),
            self.slots,
            self.samples,
        )


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On its way to a device; nobody waits.

    perf: a GPU copies from pinned memory by itself, behind what it computes; from other memory the
    host copies first. The pinned block is torch's, used again once the copy is done.
    """
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
