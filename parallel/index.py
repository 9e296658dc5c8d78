"""What lies where in a folder of stored tensors, as JSON: nothing here unpickles.

The files are those of `torch.distributed.checkpoint`; the index says at which byte the values of
each part of each logical tensor begin, and what every block of every file sums up to.
"""

import hashlib
import json
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from parallel.errors import DamagedError
from parallel.shards import Box

INDEX = "manifest.json"  # whose keys `files` and `tensors` are the index
SEAL = "sha256"  # whose key holds the sum of the rest
BLOCK = 1 << 24  # bytes with a checksum of their own
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
}


@dataclass(frozen=True)
class File:
    """What was written of a file."""

    bytes: int
    crc32: tuple[int, ...]  # of each block


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, its values in C order in a file."""

    file: str
    start: int  # byte
    box: Box


@dataclass(frozen=True)
class Stored:
    """A logical tensor and the chunks that make it up."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Index:
    """All that is needed to read a folder: its files and what lies where."""

    files: dict[str, File]
    tensors: dict[str, Stored]

    def to_json(self) -> dict[str, Any]:
        number = {name: place for place, name in enumerate(self.files)}
        tensors = {
            name: {
                "dtype": str(stored.dtype).removeprefix("torch."),
                "shape": stored.shape,
                "chunks": [
                    [number[c.file], c.start, c.box.offset, c.box.sizes] for c in stored.chunks
                ],
            }
            for name, stored in self.tensors.items()
        }
        files = {n: {"bytes": f.bytes, "crc32": f.crc32} for n, f in self.files.items()}
        return {"files": files, "tensors": tensors}

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> "Index":
        """Raises DamagedError for anything that no writer of ours can have written.

        Why so strict: an index may come from somebody else. It names no file outside its folder,
        and tensors take no more memory than there are bytes stored.
        """
        try:
            files = {_plain(name): _file(file) for name, file in tree["files"].items()}
            names = list(files)
            index = Index(files, {n: _stored(t, names) for n, t in tree["tensors"].items()})
            for name, stored in index.tensors.items():
                _check(name, stored)
            for name, file in files.items():
                _check_room(name, file, index._by_file[name])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DamagedError(f"the index cannot be right: {error}") from error
        return index

    @staticmethod
    def of(folder: Path) -> "Index":
        """Raises DamagedError if there is none to read."""
        try:
            tree = json.loads((folder / INDEX).read_text())
            check_seal(tree)
        except (OSError, ValueError, RecursionError) as error:
            raise DamagedError(f"{folder / INDEX} cannot be read ({error})") from error
        return Index.from_json(tree)

    def within(self, file: str, start: int, stop: int) -> list[tuple[str, Stored, Chunk]]:
        """Chunks with values in these bytes of a file, in the order they lie in."""
        held = self._by_file[file]
        first = bisect_right(held, start, key=_end)
        last = bisect_left(held, stop, key=lambda item: item[2].start)
        return held[first:last]

    @cached_property
    def _by_file(self) -> dict[str, list[tuple[str, Stored, Chunk]]]:
        found: dict[str, list[tuple[str, Stored, Chunk]]] = {name: [] for name in self.files}
        for name, stored in self.tensors.items():
            for chunk in stored.chunks:
                if chunk.box.numel:
                    found[chunk.file].append((name, stored, chunk))
        for held in found.values():
            held.sort(key=lambda item: item[2].start)
        return found


def _end(item: tuple[str, Stored, Chunk]) -> int:
    _, stored, chunk = item
    return chunk.start + chunk.box.numel * stored.dtype.itemsize


def sealed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a sum over all of it."""
    return {**tree, SEAL: _sum(tree)}


def check_seal(tree: Any) -> None:
    """Raises DamagedError if a tree is not as it was sealed."""
    if not isinstance(tree, dict) or tree.get(SEAL) != _sum(tree):
        raise DamagedError("it does not match its own checksum")


def _sum(tree: Mapping[str, Any]) -> str:
    # why: the format tells a reader of today that a file of tomorrow is not for it.
    known = {key: value for key, value in tree.items() if key not in (SEAL, "format")}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _plain(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name):
        raise ValueError(f"{name!a} is no file of a checkpoint")
    if not name.strip("."):
        raise ValueError(f"{name!a} is no file of a checkpoint")
    return name


def _whole(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 1 << 63:
        raise ValueError(f"{number!a} is no size or place")
    return number


def _wholes(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, list | tuple):
        raise ValueError(f"{numbers!a} is no list of sizes")
    return tuple(map(_whole, numbers))


def _file(tree: Mapping[str, Any]) -> File:
    file = File(_whole(tree["bytes"]), _wholes(tree["crc32"]))
    if len(file.crc32) != -(-file.bytes // BLOCK):
        raise ValueError(f"{file.bytes} bytes do not have {len(file.crc32)} sums")
    return file


def _stored(tree: Mapping[str, Any], files: Sequence[str]) -> Stored:
    shape = _wholes(tree["shape"])
    chunks = (
        Chunk(files[_whole(file)], _whole(start), Box(shape, _wholes(offset), _wholes(sizes)))
        for file, start, offset, sizes in tree["chunks"]
    )
    return Stored(DTYPES[tree["dtype"]], shape, tuple(chunks))


def _check(name: str, stored: Stored) -> None:
    """The chunks of a tensor cover it, and no two the same part."""
    covered = 0
    for chunk in stored.chunks:
        ends = zip(chunk.box.offset, chunk.box.sizes, stored.shape, strict=True)
        if not all(a + n <= full for a, n, full in ends) or chunk.start % stored.dtype.itemsize:
            raise ValueError(f"a chunk of {name!a} does not lie in it")
        covered += chunk.box.numel
    if covered != math.prod(stored.shape):
        raise ValueError(f"{name!a} is not stored as a whole")
    if len(stored.chunks) > 1:
        _check_apart(name, [chunk.box for chunk in stored.chunks if chunk.box.numel])


def _check_apart(name: str, boxes: list[Box]) -> None:
    boxes = sorted(boxes, key=lambda box: box.offset)
    near: list[Box] = []  # those that reach as far as the next along the first dim
    for box in boxes:
        near = [other for other in near if other.offset[0] + other.sizes[0] > box.offset[0]]
        for other in near:
            sides = zip(box.offset, box.sizes, other.offset, other.sizes, strict=True)
            if all(a < b + m and b < a + n for a, n, b, m in sides):
                raise ValueError(f"two chunks of {name!a} overlap")
        near.append(box)


def _check_room(name: str, file: File, held: Sequence[tuple[str, Stored, Chunk]]) -> None:
    """Chunks lie in their file one after the other."""
    free = 0
    for item in held:
        if item[2].start < free:
            raise ValueError(f"chunks lie upon each other in {name}")
        free = _end(item)
    if free > file.bytes:
        raise ValueError(f"a chunk lies behind the end of {name}")
