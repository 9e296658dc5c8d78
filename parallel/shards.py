"""What one rank owns of a logical tensor: flat values, and where they lie in the whole.

Every engine, FSDP2 or ZeRO, cuts its fp32 masters into such pieces. Optimizer, averages, norms and
checkpoints know nothing else of the layout.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A box of a logical tensor: what one rank computes with, before data ranks share it out."""

    shape: tuple[int, ...]  # of the whole logical tensor
    offset: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Extent:
    """A run of a box's elements, in the box's own order."""

    box: Box
    start: int
    stop: int

    def boxes(self) -> Iterator[tuple[Box, int]]:
        """Boxes of the logical tensor that the run covers, each with its place in the run."""
        for offset, sizes, place in _cover(self.box.sizes, self.start, self.stop):
            moved = tuple(a + b for a, b in zip(self.box.offset, offset, strict=True))
            yield Box(self.box.shape, moved, sizes), place - self.start


@dataclass(frozen=True)
class Piece:
    """This rank's own part of one logical tensor; no other rank owns any of it, but see counted."""

    values: Tensor  # (stop - start,), sharing memory with what the engine keeps
    extent: Extent
    counted: bool = True  # false: another rank holds the same values, and sums count it there


def _cover(sizes: _Sizes, start: int, stop: int) -> Iterator[tuple[_Sizes, _Sizes, int]]:
    """Fewest boxes whose elements are start..stop of a box in C order: (offset, sizes, place)."""
    if start >= stop:
        return
    if len(sizes) <= 1:
        yield ((start,), (stop - start,), start) if sizes else ((), (), start)
        return
    row = math.prod(sizes[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # inside one row
        yield from _inside(sizes, last, start, stop, row)
        return
    yield from _inside(sizes, first - 1, start, first * row, row)
    if last > first:
        whole = (last - first, *sizes[1:])
        yield (first, *(0,) * (len(sizes) - 1)), whole, first * row
    yield from _inside(sizes, last, last * row, stop, row)


def _inside(
    sizes: _Sizes, index: int, start: int, stop: int, row: int
) -> Iterator[tuple[_Sizes, _Sizes, int]]:
    base = index * row
    for offset, inner, place in _cover(sizes[1:], start - base, stop - base):
        yield (index, *offset), (1, *inner), place + base


def box_of(tensor: Tensor) -> Box:
    """Where a tensor's local values lie: a DTensor says so, a plain one is whole."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Box(shape, (0,) * len(shape), shape)
    sizes, offset = compute_local_shape_and_global_offset(
        shape, tensor.device_mesh, tensor.placements
    )
    return Box(shape, tuple(offset), tuple(sizes))


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
