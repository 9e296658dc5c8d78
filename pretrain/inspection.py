"""What is in a checkpoint and how two differ, read by one process without the model.

Some tensors are in memory at a time, never all.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallel import storage
from pretrain.manifest import locate, read_manifest
from pretrain.weights import groups

Kinds = dict[str, tuple[tuple[int, ...], torch.dtype]]


def contents(place: Path, *, digest: bool) -> dict[str, Any]:
    """Step, position and tensors of a checkpoint; with `digest` one SHA-256 per full tensor.

    A digest covers dtype, shape and values of the full logical tensor: the layout does not show.
    """
    folder = locate(place)
    manifest = read_manifest(folder)
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
    found: dict[str, str] = {}
    for names in groups(_sizes(kinds)):
        for name, tensor in storage.read_alone(names, folder).items():
            found[name] = digest_of(tensor)
    return found


def _sizes(kinds: Kinds) -> dict[str, int]:
    """Bytes by name."""
    return {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in kinds.items()}


def digest_of(tensor: Tensor) -> str:
    values = np.ascontiguousarray(tensor.reshape(-1).view(torch.uint8).numpy())
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(head + values.tobytes()).hexdigest()


def differences(one: Path, other: Path) -> dict[str, Any]:
    """How two checkpoints differ: their clocks, tensors that only one has, other shapes or dtypes,
    and of each tensor with other bytes the largest absolute and relative difference.

    The relative one is |a − b| / max(|a|, |b|); null where a value is not finite. `same` is true if
    nothing differs.
    """
    folders = locate(one), locate(other)
    kinds = [storage.contents(folder) for folder in folders]
    states = [read_manifest(folder)["state"] for folder in folders]
    left, right = kinds
    both = {n: kind for n, kind in left.items() if right.get(n) == kind}
    report: dict[str, Any] = {
        "checkpoints": list(map(str, folders)),
        "state": {
            key: f"{states[0].get(key)} | {states[1].get(key)}"
            for key in sorted(states[0].keys() | states[1].keys())
            if states[0].get(key) != states[1].get(key)
        },
        "only in the first": sorted(left.keys() - right.keys()),
        "only in the second": sorted(right.keys() - left.keys()),
        "other shape": [
            {"tensor": n, "first": _kind(*left[n]), "second": _kind(*right[n])}
            for n in left
            if n in right and n not in both
        ],
        "other values": _other_values(folders, both),
    }
    same = not any(value for key, value in report.items() if key != "checkpoints")
    return {"same": same, "compared": len(both), **report}


def _other_values(folders: tuple[Path, Path], kinds: Kinds) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for names in groups(_sizes(kinds)):
        ours, theirs = (storage.read_alone(names, folder) for folder in folders)
        for name in names:
            a, b = ours.pop(name), theirs.pop(name)
            if not _same_bytes(a, b):
                rows.append({"tensor": name, **_distance(a, b)})
    return rows


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _distance(a: Tensor, b: Tensor) -> dict[str, float | None]:
    a, b = a.double(), b.double()
    off = (a - b).abs_()
    scale = torch.maximum(a.abs_(), b.abs_())
    absolute = off.max().item()
    relative = torch.where(scale > 0, off / scale, off).max().item()
    found = {"absolute": absolute, "relative": relative}
    return {key: value if math.isfinite(value) else None for key, value in found.items()}
