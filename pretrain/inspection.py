"""What is in a checkpoint, read by one process without the model: names, shapes, digests."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel import storage
from pretrain import checkpoint


def contents(place: Path, *, digest: bool) -> dict[str, Any]:
    """Step, position and tensors of a checkpoint; with `digest` one SHA-256 per full tensor.

    A digest covers dtype, shape and values of the full logical tensor: the layout does not show.
    """
    folder = checkpoint.locate(place)
    manifest = checkpoint.read_manifest(folder)
    tensors: dict[str, Any] = {}
    for name, (shape, dtype) in storage.contents(folder).items():
        if digest:
            tensors[name] = digest_of(storage.read_alone([name], folder)[name])
        else:
            tensors[name] = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
    return {
        "checkpoint": str(folder),
        **manifest["state"],
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "tensors": tensors,
    }


def digest_of(tensor: Tensor) -> str:
    values = np.ascontiguousarray(tensor.reshape(-1).view(torch.uint8).numpy())
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(head + values.tobytes()).hexdigest()
