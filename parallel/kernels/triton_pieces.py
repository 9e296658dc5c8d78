"""What the Triton kernels share: launching, phase grids, and sums in a fixed order."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_RUN = 128  # rows that one program of `sums` adds
_COLUMNS, _ROWS = 64, 16


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Runs a kernel on the device of its first tensor."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants)


def sums(parts: Tensor) -> Tensor:
    """(G, R, N) float32, contiguous -> (G, N): the sums over R.

    In an order that R alone sets, so that equal parts give equal bits. No atomics.
    """
    groups, rows, columns = parts.shape
    run = min(_RUN, triton.cdiv(rows, _ROWS) * _ROWS)
    runs = triton.cdiv(rows, run)
    out = parts.new_empty(groups, runs, columns)
    grid = (groups * runs, triton.cdiv(columns, _COLUMNS))
    sizes = (runs, rows, columns)
    launch(_sums, grid, parts, out, *sizes, run=run, block_r=_ROWS, block_n=_COLUMNS)
    return out[:, 0] if runs == 1 else sums(out)


@triton.jit
def _sums(
    parts, out, runs, rows, columns, run: tl.constexpr, block_r: tl.constexpr, block_n: tl.constexpr
):
    program = tl.program_id(0)
    group = (program // runs).to(tl.int64)
    column = tl.program_id(1) * block_n + tl.arange(0, block_n)
    total = tl.zeros((block_r, block_n), dtype=tl.float32)
    for first in range(0, run, block_r):
        row = (program % runs) * run + first + tl.arange(0, block_r)
        at = (group * rows + row)[:, None] * columns + column[None, :]
        total += tl.load(parts + at, (row < rows)[:, None] & (column < columns)[None, :], other=0.0)
    tl.store(out + program.to(tl.int64) * columns + column, tl.sum(total, 0), column < columns)


@triton.jit
def place(row, column, height, width, split: tl.constexpr):
    """Where a pixel stands among those of its image, in phase grids if split."""
    at = row * width + column
    if split:
        phase = (row % 2) * 2 + column % 2
        at = phase * (height * width // 4) + (row // 2) * (width // 2) + column // 2
    return at
