"""depthwise.py's operators in Triton: y = a + bias + depthwise 5×5 of a, and its gradients.

A program walks down the rows of some strips, each four columns of one image, with a block of their
channels. It reads eight columns of a row once, and adds them to all that they touch: the sums of
five rows, or of 25 taps. Columns, sums and taps are tuples of tiles (strips, channels), so that
they stay in registers. Sums are float32. The gradient of `a` is the same kernel with the taps
turned round. Source: arithmetic.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels.triton_pieces import launch, sums

_TAPS = 25
_ROWS = 16  # most that a program walks; with the four around them, fives
_TOGETHER = 16  # rows, of several images if need be, whose gradients of taps one program adds
_STRIPS, _CHANNELS = 4, 64  # perf: a warp a strip, two channels a thread: all fits its registers


def mix(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, split: bool) -> Tensor:
    """x: (B, H, W, C); weight: (C, 1, 5, 5); bias: (C,). See depthwise.mix."""
    batch, height, width, channels = x.shape
    shape = (4 * batch, height * width // 4, channels) if split else x.shape
    out = x.new_empty(shape)
    # perf: in the kernel a GELU would be taken at each of more than two loads of a value.
    a = F.gelu(x) if gelu else x
    taps = weight.view(channels, _TAPS).t().contiguous()
    flags = {"split_in": False, "split_out": split, "has_bias": True, "slope": False}
    sizes, grid, kinds = _plan(x.shape)
    launch(_mix5, grid, a, taps, bias, x, out, *sizes, **kinds, **flags)
    return out


def mix_backward(
    grad: Tensor, x: Tensor, weight: Tensor, gelu: bool, split: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, in their dtypes."""
    channels = x.shape[-1]
    of_x, a = torch.empty_like(x), F.gelu(x) if gelu else x
    taps = weight.view(channels, _TAPS).t().flip(0).contiguous()
    flags = {"split_in": split, "split_out": False, "has_bias": False, "slope": gelu}
    sizes, grid, kinds = _plan(x.shape)
    launch(_mix5, grid, grad, taps, taps, x, of_x, *sizes, **kinds, **flags)
    turns = triton.cdiv(_TOGETHER, x.shape[1])
    sizes, grid, kinds = _plan(x.shape, turns)
    many = grid[0] * grid[2]
    parts = torch.empty((many, _TAPS + 1, channels), dtype=torch.float32, device=x.device)
    launch(_of_weight, grid, grad, a, parts, *sizes, turns, **kinds, split=split)
    total = sums(parts.view(1, many, -1)).view(_TAPS + 1, channels).to(weight.dtype)
    return of_x, total[:_TAPS].t().contiguous().view(weight.shape), total[_TAPS].clone()


def _plan(
    shape: torch.Size, turns: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """Strips, height, width and channels; the grid over (strips, channels, rows); and what a kernel
    is compiled for: as little as can be, because it takes seconds.
    """
    batch, height, width, channels = shape
    rows = min(_ROWS, triton.cdiv(height + 4, 5) * 5 - 4)
    strips = batch * triton.cdiv(width, 4)
    steps = (turns * _STRIPS, _CHANNELS, rows)
    grid = tuple(map(triton.cdiv, (strips, channels, height), steps))
    kinds = {"rows": rows, "whole": width % 4 == 0, "block_s": _STRIPS, "block_c": _CHANNELS}
    # perf: Triton's default from 3.10, no fusion, makes two instructions of a tap.
    return (strips, height, width, channels), grid, kinds | {"enable_fp_fusion": True}


# Not for one height each: only what decides how values are loaded is looked at.
_any = ["strips", "height", "width"]


@triton.jit(do_not_specialize=_any)
def _mix5(
    a,
    taps,
    bias,
    x,
    out,
    strips,
    height,
    width,
    channels,
    split_in: tl.constexpr,
    split_out: tl.constexpr,
    has_bias: tl.constexpr,
    slope: tl.constexpr,
    rows: tl.constexpr,
    whole: tl.constexpr,
    block_s: tl.constexpr,
    block_c: tl.constexpr,
):
    strip = (tl.program_id(0) * block_s + tl.arange(0, block_s))[:, None]
    channel = (tl.program_id(1) * block_c + tl.arange(0, block_c))[None, :]
    inside, some = _inside(strip, strips, width, whole), channel < channels
    start = tl.zeros((block_s, block_c), dtype=tl.float32)
    own = channel + tl.zeros((block_s, block_c), dtype=tl.int32)  # each warp loads its own taps
    if has_bias:
        start += tl.load(bias + own, some, other=0.0).to(tl.float32)
    weights = ()
    for tap in tl.static_range(25):
        weight = tl.load(taps + tap * channels + own, some, other=0.0).to(tl.float32)
        weights = weights + (weight + 1.0 if tap == 12 else weight,)  # 1 for y's own a
    a = _base(a, strip, channel, height, width, channels, split_in)
    x = _base(x, strip, channel, height, width, channels, False)
    out = _base(out, strip, channel, height, width, channels, split_out)
    first = tl.program_id(2) * rows
    last = tl.minimum(first + rows, height)
    ahead = _read(a, first - 2, 0, height, inside, some, -2, 6, height, width, channels, split_in)
    totals = (start,) * 20  # of four columns in rows row - 2 to row + 2
    for step in range(0, rows + 4, 5):
        for k in tl.static_range(5):  # after five rows each total stands in its place again
            row, values = first + step + k - 2, _floats(ahead)
            # perf: what the next row needs is on its way while this one is added.
            ahead = _read(
                a, row + 1, 0, height, inside, some, -2, 6, height, width, channels, split_in
            )
            if slope:
                here = _read(
                    x, row - 2, first, last, inside, some, 0, 4, height, width, channels, False
                )
            if (row >= 0) & (row < height):
                totals = _spread(totals, values, weights, inside, whole)
            if (row - 2 >= first) & (row - 2 < last):
                to = _places(out, row - 2, 0, 4, height, width, channels, split_out)
                for p in tl.static_range(4):
                    total = totals[p]
                    if slope:
                        total *= _slope(here[p].to(tl.float32))
                    tl.store(to[p], total.to(out.dtype.element_ty), inside[p + 2] & some)
            totals = totals[4:] + (start,) * 4


@triton.jit
def _spread(totals, values, weights, inside, whole: tl.constexpr):
    """Adds eight columns of a row to the totals of five rows, each through its row of taps."""
    new = ()
    for row in tl.static_range(5):
        for p in tl.static_range(4):
            total = totals[row * 4 + p]
            for j in tl.static_range(5):
                more = total + values[p + j] * weights[(4 - row) * 5 + j]
                # why: outside the image nothing is added, not 0 times a weight that is not finite.
                if whole and p + j >= 2 and p + j < 6:
                    total = more
                else:
                    total = tl.where(inside[p + j], more, total)
            new = new + (total,)
    return new


@triton.jit(do_not_specialize=[*_any, "turns"])
def _of_weight(
    grad,
    a,
    parts,
    strips,
    height,
    width,
    channels,
    turns,
    split: tl.constexpr,
    rows: tl.constexpr,
    whole: tl.constexpr,
    block_s: tl.constexpr,
    block_c: tl.constexpr,
):
    channel = tl.program_id(1) * block_c + tl.arange(0, block_c)
    some = channel < channels
    first = tl.program_id(2) * rows
    last = tl.minimum(first + rows, height)
    zero = tl.zeros((block_s, block_c), dtype=tl.float32)
    totals, bias = (zero,) * 25, zero
    begin = tl.program_id(0) * turns
    for turn in range(begin, tl.minimum(begin + turns, tl.cdiv(strips, block_s))):
        strip = (turn * block_s + tl.arange(0, block_s))[:, None]
        inside = _inside(strip, strips, width, whole)
        of_y = _base(grad, strip, channel[None, :], height, width, channels, split)
        near = _base(a, strip, channel[None, :], height, width, channels, False)
        below = _read(of_y, first, first, last, inside, some, 0, 4, height, width, channels, split)
        ahead = _read(
            near, first - 2, 0, height, inside, some, -2, 6, height, width, channels, False
        )
        grads = (zero,) * 20  # of four columns in rows row - 2 to row + 2
        for step in range(0, rows + 4, 5):
            for k in tl.static_range(5):  # after five rows each gradient stands in its place again
                row, values = first + step + k - 2, _floats(ahead)
                grads = grads[4:] + _floats(below)
                # perf: what the next row needs is on its way while this one is added.
                below = _read(
                    of_y, row + 3, first, last, inside, some, 0, 4, height, width, channels, split
                )
                ahead = _read(
                    near, row + 1, 0, height, inside, some, -2, 6, height, width, channels, False
                )
                bias += (grads[16] + grads[17]) + (grads[18] + grads[19])
                if (row >= 0) & (row < height):
                    new = ()
                    for i in tl.static_range(5):
                        five, at = totals[i * 5 : i * 5 + 5], row + 2 - i
                        if (at >= first) & (at < last):
                            four = grads[16 - i * 4 : 20 - i * 4]
                            five = _products(five, values, four, inside, whole)
                        new = new + five
                    totals = new
    part = tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
    to = parts + part.to(tl.int64) * 26 * channels + channel
    for tap in tl.static_range(25):
        tl.store(to + tap * channels, tl.sum(totals[tap], 0), some)
    tl.store(to + 25 * channels, tl.sum(bias, 0), some)


@triton.jit
def _products(totals, values, grads, inside, whole: tl.constexpr):
    """Adds four columns of gradients, times what they meet, to the totals of a row of five taps."""
    new = ()
    for j in tl.static_range(5):
        total = totals[j]
        for p in tl.static_range(4):
            more = total + values[p + j] * grads[p]
            if whole and p + j >= 2 and p + j < 6:
                total = more
            else:
                total = tl.where(inside[p + j] & inside[p + 2], more, total)
        new = new + (total,)
    return new


@triton.jit
def _inside(strip, strips, width, whole: tl.constexpr):
    """Whether columns -2 to 5 of a strip are in the image, (strips, 1) each."""
    column, step = strip % ((width + 3) // 4) * 4, 4 if whole else 1
    inside = ()
    for j in tl.static_range(-2, 6):
        near = column + j // step * step  # fewer conditions where the image ends with a strip
        inside = inside + ((strip < strips) & (near >= 0) & (near < width),)
    return inside


@triton.jit
def _base(start, strip, channel, height, width, channels, split):
    """Row 0 and column 0 of strips; within an image offsets are of 32 bits."""
    across = (width + 3) // 4
    image = (strip // across).to(tl.int64) * (height * width * channels)
    return start + image + strip % across * ((2 if split else 4) * channels) + channel


@triton.jit
def _places(
    start,
    row,
    begin: tl.constexpr,
    end: tl.constexpr,
    height,
    width,
    channels,
    split: tl.constexpr,
):
    """Of columns begin to end of a row, in phase grids if split, as triton_pieces.place."""
    if split:
        start += (row % 2 * (height * width // 2) + row // 2 * (width // 2)) * channels
    else:
        start += row * (width * channels)
    places = ()
    for j in tl.static_range(begin, end):
        at = j % 2 * (height * width // 4) + j // 2 if split else j
        places = places + (start + at * channels,)
    return places


@triton.jit
def _read(
    start,
    row,
    low,
    high,
    inside,
    some,
    begin: tl.constexpr,
    end: tl.constexpr,
    height,
    width,
    channels,
    split: tl.constexpr,
):
    """Columns begin to end of a row; zeros outside the image and beyond rows low to high."""
    line, values = row + tl.zeros((1, 1), dtype=tl.int32), ()  # a tile, as the other conditions
    some &= (line >= low) & (line < high)
    places = _places(start, row, begin, end, height, width, channels, split)
    for j in tl.static_range(end - begin):
        mask = inside[begin + j + 2] & some
        values = values + (tl.load(places[j], mask, other=0.0),)
    return values


@triton.jit
def _floats(values):
    floats = ()
    for j in tl.static_range(len(values)):
        floats = floats + (values[j].to(tl.float32),)
    return floats


@triton.jit
def _slope(v):
    """Of GELU: Phi(v) + v phi(v). Source: Abramowitz and Stegun 26.2.17 (7.5e-8 absolute)."""
    t, bell = 1.0 / (1.0 + 0.2316419 * tl.abs(v)), tl.exp2(v * v * -0.72134752) * 0.39894228
    tail = (((1.330274429 * t - 1.821255978) * t + 1.781477937) * t - 0.356563782) * t + 0.319381530
    tail *= t * bell
    return tl.where(v < 0.0, tail, 1.0 - tail) + v * bell
