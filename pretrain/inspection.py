"""What is in a checkpoint, read by one process without the model: names, shapes, digests."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel import storage
from pretrain import checkpoint

Kinds = dict[str, tuple[tuple[int, ...], torch.dtype]]
_AT_ONCE = 1 << 30  # bytes of tensors in memory; one larger tensor is read alone


def contents(place: Path, *, digest: bool) -> dict[str, Any]:
    """Step, position and tensors of a checkpoint; with `digest` one SHA-256 per full tensor.

    A digest covers dtype, shape and values of the full logical tensor: the layout does not show.
    """
    folder = checkpoint.locate(place)
    manifest = checkpoint.read_manifest(folder)
    kinds = storage.contents(folder)
    tensors = _digests(folder, kinds) if digest else {n: _kind(*k) for n, k in kinds.items()}
    return {
        "checkpoint": str(folder),
        **manifest["state"],
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "tensors": tensors,
    }


def _kind(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _digests(folder: Path, kinds: Kinds) -> dict[str, str]:
    """Digest by name; reads many tensors at a time, never more than about `_AT_ONCE` bytes."""
    found: dict[str, str] = {}
    names, held = [], 0
    for name, (shape, dtype) in kinds.items():
        names.append(name)
        held += math.prod(shape) * dtype.itemsize
        if held >= _AT_ONCE or len(found) + len(names) == len(kinds):
            for key, tensor in storage.read_alone(names, folder).items():
                found[key] = digest_of(tensor)
            names, held = [], 0
    return found


def digest_of(tensor: Tensor) -> str:
    values = np.ascontiguousarray(tensor.reshape(-1).view(torch.uint8).numpy())
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(head + values.tobytes()).hexdigest()
