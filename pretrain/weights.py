"""Weights in files of other programs: opened without running code, read and written bit by bit.

Reads safetensors (one file, or several with an index) and PyTorch's own files (tensors only).
Writes safetensors in parts, as Hugging Face does. Knows keys and tensors, not what they mean.
"""

import argparse
import json
import math
import pickle
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretrain.layouts.rules import Shape, Shapes, WeightsError

K = TypeVar("K", bound=Hashable)
INDEX = ".safetensors.index.json"
AT_ONCE = 1 << 28  # bytes of tensors read at a time; one larger tensor is read alone
_PLACES = ("ema", "model")  # of the state dict in a training checkpoint, the better one first
# What torch's own unpickler says of a file that is damaged, old, or wants to run code.
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    OSError,
)


@dataclass(frozen=True)
class Weights:
    """What a file holds; tensors are read when they are asked for."""

    path: Path
    shapes: dict[str, Shape]
    metadata: dict[str, str]
    read: Callable[[str], Tensor]
    under: str | None = None  # the key that the state dict stood under


def open_weights(path: Path) -> Weights:
    """Opens a .safetensors file, an index of several, a directory with one, or a .pt or .pth file.

    Raises WeightsError for anything else, and for a file that cannot be read without running code.
    """
    if path.is_dir():
        found = sorted([*path.glob(f"*{INDEX}"), *path.glob("*.safetensors")])
        # why: the parts that an index names stand beside it.
        found = [f for f in found if f.name.endswith(INDEX)] or found
        if len(found) != 1:
            raise WeightsError(
                f"{path} holds {len(found) or 'no'} weight files; give one .safetensors, its "
                "index.json, .pt or .pth"
            )
        path = found[0]
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; give a .safetensors, .pt or .pth file")
    if path.name.endswith(INDEX):
        return _safetensors(path, _parts(path))
    if path.suffix == ".safetensors":
        return _safetensors(path, [path])
    if path.suffix in (".pt", ".pth"):
        return _torch(path)
    raise WeightsError(f"{path} ends in {path.suffix!r}; give a .safetensors, .pt or .pth file")


def _parts(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of weight files ({error!r})") from error
    # why: an index may come from somebody else; it names no file outside its folder.
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise WeightsError(f"{index} names {outside[0]!r}, which is no file beside it")
    return [index.with_name(name) for name in sorted(names)]


def _safetensors(path: Path, parts: list[Path]) -> Weights:
    where: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for part in parts:
        try:
            file = safe_open(part, framework="pt")
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{part} cannot be read as safetensors ({error})") from error
        metadata |= file.metadata() or {}
        where |= dict.fromkeys(file.keys(), file)
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key, file in where.items()}
    return Weights(path, shapes, metadata, lambda key: where[key].get_tensor(key))


def _torch(path: Path) -> Weights:
    try:
        # why: a training checkpoint of DiT holds its arguments; a Namespace is a bag of values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(
            f"{path} cannot be read without running code from it ({reason}); save its state dict "
            "with torch.save in the present format, or as safetensors"
        ) from error
    under = None
    if isinstance(tree, Mapping) and not _is_state(tree):
        under = next((key for key in _PLACES if _is_state(tree.get(key))), None)
        tree = tree[under] if under else tree
    if not _is_state(tree):
        raise WeightsError(
            f"{path} holds {type(tree).__name__}, expected a state dict, or one under "
            f"{' or '.join(_PLACES)}"
        )
    state: Mapping[str, Tensor] = tree
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    return Weights(path, shapes, {}, lambda key: state[key].detach(), under)


def _is_state(tree: Any) -> bool:
    if not isinstance(tree, Mapping) or not tree:
        return False
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tree.items())


def groups(sizes: Mapping[K, int], limit: int | None = None) -> Iterator[list[K]]:
    """Keys in order, as many at a time as have at most `limit` bytes together, at least one.

    limit: by default `AT_ONCE`.
    """
    limit = AT_ONCE if limit is None else limit
    names: list[K] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names


def write(
    folder: Path,
    stem: str,
    tensors: Iterable[tuple[str, Tensor]],
    expected: Shapes,
    dtype: torch.dtype,
    limit: int,
    metadata: dict[str, str],
) -> list[str]:
    """Writes STEM.safetensors, or parts of at most `limit` bytes and their index; their names.

    tensors: in the order of `expected`. No more than one part is held. A tensor larger than `limit`
    is a part by itself.
    """
    sizes = {key: math.prod(shape) * dtype.itemsize for key, shape in expected.items()}
    parts = list(groups(sizes, limit))
    names = [
        f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors"
        if len(parts) > 1
        else f"{stem}.safetensors"
        for i in range(1, len(parts) + 1)
    ]
    stream = iter(tensors)
    for name, keys in zip(names, parts, strict=True):
        held: dict[str, Tensor] = {}
        for key in keys:
            found, tensor = next(stream)
            assert found == key, f"{found} came, {key} was to come"
            assert tuple(tensor.shape) == tuple(expected[key]), f"{key} is {tuple(tensor.shape)}"
            # why: a copy each, because tensors that share memory cannot be saved.
            held[key] = tensor.to(dtype, memory_format=torch.contiguous_format, copy=True)
        save_file(held, folder / name, metadata={"format": "pt", **metadata})
    assert next(stream, None) is None, "more tensors than expected"
    if len(parts) > 1:
        weight_map = {key: name for name, keys in zip(names, parts, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2))
    return names
