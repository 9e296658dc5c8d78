"""Reading tensors back at any layout: each byte of a folder is read once, by one rank, and checked.

`parallel.index` says what lies where; `parallel.saving` wrote it. Nothing here unpickles. What a
rank reads of what others own goes to them in rounds of a few blocks, so that nobody ever holds more
than its own part and those.
"""

import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.errors import DamagedError
from parallel.index import BLOCK, Chunk, Index
from parallel.shards import Box, Extent, Piece, box_of, local

AT_ONCE = 4  # blocks that a rank holds while it reads


def contents(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in `folder`, by name."""
    tensors = sorted(Index.of(folder).tensors.items())
    return {name: (stored.shape, stored.dtype) for name, stored in tensors}


def read(tensors: Mapping[str, Tensor | Piece], folder: Path, index: Index) -> int:
    """Fills pieces and tensors in place, whatever layout wrote them; returns bytes this rank read.

    Every rank calls it; together they read every byte of `folder` once. Raises DamagedError or
    OSError on all ranks alike, when what is there now is undefined; ValueError for a tensor that is
    not stored, or has another shape.
    """
    ranks = dist.get_world_size()
    wants = {name: _wanted(tensor) for name, tensor in tensors.items()}
    _check_wanted(wants, index)
    # perf: weights, averages and moments have the same boxes, which are then sent once.
    known: dict[tuple[Box, ...], tuple[Box, ...]] = {}
    mine = {n: tuple(box for box, _ in parts) for n, parts in wants.items()}
    mine = {n: known.setdefault(boxes, boxes) for n, boxes in mine.items()}
    everyone: list[dict[str, tuple[Box, ...]]] = [{} for _ in range(ranks)]
    dist.all_gather_object(everyone, mine)  # dist: every rank, once a load
    shares = _shares(_blocks(index), ranks)
    with _Reading(folder, index, wants, everyone, dist.get_rank()) as reading:
        for begin in range(0, max(map(len, shares)), AT_ONCE):
            reading.round([share[begin : begin + AT_ONCE] for share in shares])
    problems: list[ValueError | OSError | None] = [None] * ranks
    dist.all_gather_object(problems, reading.problem())  # dist: every rank, once a load
    # why: what could not be read is not known to be damaged.
    for problem in sorted(filter(None, problems), key=lambda p: not isinstance(p, OSError)):
        raise problem
    return reading.bytes


def read_alone(names: Sequence[str], folder: Path) -> dict[str, Tensor]:
    """Full tensors of `folder` by name, on the CPU, without a process group.

    Reads the blocks that hold them. Raises DamagedError or OSError; ValueError for a name that is
    not stored.
    """
    index = Index.of(folder)
    missing = sorted(set(names) - index.tensors.keys())
    if missing:
        raise ValueError(f"{folder} holds no {', '.join(missing[:4])}")
    stored = {name: index.tensors[name] for name in names}
    full = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in stored.items()}
    wants = {name: _wanted(tensor) for name, tensor in full.items()}
    needed = {
        (chunk.file, number)
        for s in stored.values()
        for chunk in s.chunks
        for number in _touched(chunk, s.dtype)
    }
    boxes = {name: [box for box, _ in parts] for name, parts in wants.items()}
    blocks = [block for block in _blocks(index) if (block.file, block.number) in needed]
    with _Reading(folder, index, wants, [boxes], 0) as reading:
        for begin in range(0, len(blocks), AT_ONCE):
            reading.round([blocks[begin : begin + AT_ONCE]])
    problem = reading.problem()
    if problem is not None:
        raise problem
    return full


def _touched(chunk: Chunk, dtype: torch.dtype) -> range:
    size = chunk.box.numel * dtype.itemsize
    return range(chunk.start // BLOCK, -(-(chunk.start + size) // BLOCK))


Wanted = list[tuple[Box, Tensor]]  # boxes of a logical tensor and where their values go


def _wanted(tensor: Tensor | Piece) -> Wanted:
    if isinstance(tensor, Piece):
        return [
            (box, tensor.values[place : place + box.numel].view(box.sizes))
            for box, place in tensor.extent.boxes()
        ]
    return [(box_of(tensor), local(tensor))]


def _check_wanted(wants: Mapping[str, Wanted], index: Index) -> None:
    missing = sorted(wants.keys() - index.tensors.keys())
    if missing:
        raise ValueError(f"no {', '.join(missing[:4])} is stored ({len(missing)} missing in all)")
    for name, parts in wants.items():
        stored = index.tensors[name]
        for box, values in parts:
            if box.shape != stored.shape or values.dtype != stored.dtype:
                raise ValueError(
                    f"{name} is stored as {stored.dtype} {list(stored.shape)}, wanted is "
                    f"{values.dtype} {list(box.shape)}"
                )


@dataclass(frozen=True)
class _Block:
    file: str
    number: int
    start: int  # bytes
    stop: int


def _blocks(index: Index) -> list[_Block]:
    """All blocks, files of the same writer together."""
    return [
        _Block(name, number, start, min(start + BLOCK, file.bytes))
        for name, file in sorted(index.files.items(), key=lambda item: _writer(item[0]))
        for number, start in enumerate(range(0, file.bytes, BLOCK))
    ]


def _writer(file: str) -> tuple[int, str]:
    number = re.search(r"\d+", file, re.ASCII)
    return (int(number[0]) if number else -1, file)


def _shares(blocks: Sequence[_Block], ranks: int) -> list[list[_Block]]:
    """Blocks by the rank that reads them: stretches of about the same bytes.

    At the layout that wrote them a rank so reads about what it owns.
    """
    total = sum(block.stop - block.start for block in blocks)
    shares: list[list[_Block]] = [[] for _ in range(ranks)]
    before = 0
    for block in blocks:
        middle = before + (block.stop - block.start) // 2
        shares[min(ranks - 1, middle * ranks // max(total, 1))].append(block)
        before += block.stop - block.start
    return shares


class _Reading:
    """One rank's side of a load: the blocks it reads, and where values go."""

    def __init__(
        self,
        folder: Path,
        index: Index,
        wants: Mapping[str, Wanted],
        everyone: Sequence[Mapping[str, Sequence[Box]]],
        rank: int,
    ) -> None:
        """everyone: the boxes that each rank wants, by name; those of `wants` at `rank`."""
        self.bytes = 0  # read so far
        self._folder, self._index, self._wants = folder, index, wants
        self._everyone, self._rank = everyone, rank
        self._missing = {n: sum(box.numel for box, _ in parts) for n, parts in wants.items()}
        self._problem: DamagedError | OSError | None = None
        self._room: dict[int, Tensor] = {}
        self._pool = ThreadPoolExecutor(AT_ONCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def problem(self) -> DamagedError | OSError | None:
        """What was wrong with what this rank read or got."""
        lost = [name for name, count in self._missing.items() if count]
        if self._problem is None and lost:
            return DamagedError(f"{self._folder} does not hold all of {lost[0]}")
        return self._problem

    def round(self, shares: Sequence[Sequence[_Block]]) -> None:
        """Reads this rank's blocks, sends out what others own, takes in what it owns itself."""
        own = shares[self._rank]
        held = list(self._pool.map(self._load, range(len(own)), own))
        self.bytes += sum(block.stop - block.start for block in own)
        for block, values in zip(own, held, strict=True):
            for name, part, target in self._overlaps(block, self._rank):
                self._take(name, target, part.of(values))
        if len(shares) > 1:
            self._exchange(shares, held)

    def _exchange(self, shares: Sequence[Sequence[_Block]], held: Sequence[Tensor]) -> None:
        sent, received = [torch.empty(0, dtype=torch.uint8)], []
        to, come = [0] * len(shares), [0] * len(shares)
        for rank in range(len(shares)):
            if rank == self._rank:
                continue
            for block, values in zip(shares[self._rank], held, strict=True):
                for _, part, _ in self._overlaps(block, rank):
                    sent.append(part.of(values).contiguous().view(-1).view(torch.uint8))
                    to[rank] += sent[-1].numel()
            for block in shares[rank]:
                for name, part, target in self._overlaps(block, self._rank):
                    received.append((name, part, target))
                    come[rank] += math.prod(part.sizes) * part.dtype.itemsize
        parts = torch.empty(sum(come), dtype=torch.uint8)
        dist.all_to_all_single(parts, torch.cat(sent), come, to)  # dist: every rank, once a round
        place = 0
        for name, part, target in received:
            end = place + math.prod(part.sizes) * part.dtype.itemsize
            values = parts[place:end].clone().view(part.dtype).view(part.sizes)
            self._take(name, target, values)
            place = end

    def _take(self, name: str, target: "_Target", values: Tensor) -> None:
        self._wants[name][target.which][1][target.inside].copy_(values)
        self._missing[name] -= values.numel()

    def _overlaps(self, block: _Block, rank: int) -> "Iterator[tuple[str, _Part, _Target]]":
        """What a rank wants of a block, in an order that all ranks agree on."""
        boxes = self._everyone[rank]
        for name, stored, chunk in self._index.within(block.file, block.start, block.stop):
            if name not in boxes:
                continue
            size = stored.dtype.itemsize
            first = max(chunk.start, block.start)
            last = min(chunk.start + chunk.box.numel * size, block.stop)
            run = Extent(chunk.box, (first - chunk.start) // size, (last - chunk.start) // size)
            for held, place in run.boxes():
                start = first - block.start + place * size
                for which, box in enumerate(boxes[name]):
                    common = _common(held, box)
                    if common is not None:
                        part = _Part(start, held, _slices(common, held), common.sizes, stored.dtype)
                        yield name, part, _Target(which, _slices(common, box))

    def _load(self, slot: int, block: _Block) -> Tensor:
        """The bytes of a block, (n,) uint8; undefined, and a problem, if they are not as written.

        Runs in a thread; a slot's memory is used again in the next round.
        """
        if slot not in self._room:
            self._room[slot] = torch.empty(BLOCK, dtype=torch.uint8)
        values = self._room[slot][: block.stop - block.start]
        path, view = self._folder / block.file, values.numpy().data
        try:
            with path.open("rb", buffering=0) as file:
                got, at = 0, block.start
                while got < len(view):
                    count = os.preadv(file.fileno(), [view[got:]], at + got)
                    if not count:
                        self._problem = DamagedError(f"{path} ends at byte {at + got}")
                        return values
                    got += count
        except OSError as error:
            self._problem = OSError(f"{path} cannot be read: {error}")
            return values
        if zlib.crc32(view) != self._index.files[block.file].crc32[block.number]:
            self._problem = DamagedError(
                f"{path} does not match its checksum at bytes {block.start}-{block.stop}"
            )
        return values


@dataclass(frozen=True)
class _Part:
    """Values that one block holds of one wanted box."""

    start: int  # byte in the block, of the box that lies there in one run
    held: Box
    inside: tuple[slice, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype

    def of(self, values: Tensor) -> Tensor:
        """A view of the block's bytes."""
        stop = self.start + self.held.numel * self.dtype.itemsize
        whole = values[self.start : stop].view(self.dtype).view(self.held.sizes)
        return whole[self.inside]


@dataclass(frozen=True)
class _Target:
    which: int  # of the boxes wanted of a tensor
    inside: tuple[slice, ...]


def _common(a: Box, b: Box) -> Box | None:
    """Where two boxes of a tensor overlap."""
    start = tuple(map(max, a.offset, b.offset))
    sides = zip(a.offset, a.sizes, b.offset, b.sizes, strict=True)
    ends = [min(o + n, p + m) for o, n, p, m in sides]
    sizes = tuple(end - first for first, end in zip(start, ends, strict=True))
    return Box(a.shape, start, sizes) if min(sizes, default=1) > 0 else None


def _slices(part: Box, whole: Box) -> tuple[slice, ...]:
    starts = (a - b for a, b in zip(part.offset, whole.offset, strict=True))
    return tuple(slice(a, a + n) for a, n in zip(starts, part.sizes, strict=True))


def flush(path: Path) -> None:
    """fsync of a file or of a directory's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
