"""heads.py's operators in Triton: turn by a table, length one, times the scale of a head.

A program has some rows, a row being one head of one token, and computes in float32. Source:
arithmetic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels.triton_pieces import launch, sums

_ROWS = 16


def heads(x: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:
    """x: (B, N, nh, hd); table: (2, N, hd) float32; scale: (nh,). See heads.cosine_heads."""
    out = torch.empty_like(x)
    _launch(_heads, x, (x, table, _or(scale, x), out), scale)
    return out


def heads_backward(
    grad: Tensor, x: Tensor, table: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of scale (nh,) float32."""
    count = x.shape[2]
    of_x = torch.empty_like(x)
    along = torch.empty((1, x.shape[0] * x.shape[1], count), dtype=torch.float32, device=x.device)
    _launch(_heads_backward, x, (grad, x, table, _or(scale, x), of_x, along), scale)
    return of_x, sums(along).view(count).clone()


def _or(scale: Tensor | None, x: Tensor) -> Tensor:
    return x if scale is None else scale  # a pointer that is not read


def _launch(kernel: object, x: Tensor, given: tuple[Tensor, ...], scale: Tensor | None) -> None:
    batch, tokens, count, size = x.shape
    rows = batch * tokens * count
    sizes = (rows, tokens, count, size)
    flags = {"scaled": scale is not None, "block_r": _ROWS}
    block = triton.next_power_of_2(size)
    launch(kernel, (triton.cdiv(rows, _ROWS),), *given, *sizes, **flags, block_d=block)


@triton.jit
def _heads(
    x,
    table,
    scale,
    out,
    rows,
    tokens,
    count,
    size,
    scaled: tl.constexpr,
    block_r: tl.constexpr,
    block_d: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * block_r + tl.arange(0, block_r)
    d = tl.arange(0, block_d)
    inside = (row < rows)[:, None] & (d < size)[None, :]
    turn = table + (row // count % tokens)[:, None] * size
    at = row[:, None] * size
    here = tl.load(x + at + d, inside, other=0.0).to(tl.float32)
    beside = tl.load(x + at + (d ^ 1), inside, other=0.0).to(tl.float32)
    cosine = tl.load(turn + d, inside, other=0.0)
    sine = tl.load(turn + tokens * size + d, inside, other=0.0)
    turned = here * cosine + beside * sine
    length = tl.sqrt(tl.sum(turned * turned, 1))
    # why: not maximum, which would give a number for a length that is none.
    unit = turned / tl.where(length < 1e-12, 1e-12, length)[:, None]
    if scaled:
        unit *= tl.load(scale + row % count, row < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + at + d, unit.to(out.dtype.element_ty), inside)


@triton.jit
def _heads_backward(
    grad,
    x,
    table,
    scale,
    of_x,
    along,
    rows,
    tokens,
    count,
    size,
    scaled: tl.constexpr,
    block_r: tl.constexpr,
    block_d: tl.constexpr,
):
    """What lies beside a channel is computed twice, not exchanged between threads."""
    row = tl.program_id(0).to(tl.int64) * block_r + tl.arange(0, block_r)
    d = tl.arange(0, block_d)
    inside = (row < rows)[:, None] & (d < size)[None, :]
    turn = table + (row // count % tokens)[:, None] * size
    at = row[:, None] * size
    here = tl.load(x + at + d, inside, other=0.0).to(tl.float32)
    beside = tl.load(x + at + (d ^ 1), inside, other=0.0).to(tl.float32)
    cosine = tl.load(turn + d, inside, other=0.0)
    sine = tl.load(turn + tokens * size + d, inside, other=0.0)
    sine_beside = tl.load(turn + tokens * size + (d ^ 1), inside, other=0.0)
    cosine_beside = tl.load(turn + (d ^ 1), inside, other=0.0)
    turned = here * cosine + beside * sine
    length = tl.sqrt(tl.sum(turned * turned, 1))
    length = tl.where(length < 1e-12, 1e-12, length)[:, None]
    unit = turned / length
    unit_beside = (beside * cosine_beside + here * sine_beside) / length
    g = tl.load(grad + at + d, inside, other=0.0).to(tl.float32)
    g_beside = tl.load(grad + at + (d ^ 1), inside, other=0.0).to(tl.float32)
    dot = tl.sum(unit * g, 1)
    tl.store(along + row, dot, row < rows)
    to = (g - unit * dot[:, None]) / length
    to_beside = (g_beside - unit_beside * dot[:, None]) / length
    total = to * cosine + to_beside * sine_beside
    if scaled:
        total *= tl.load(scale + row % count, row < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(of_x + at + d, total.to(of_x.dtype.element_ty), inside)
