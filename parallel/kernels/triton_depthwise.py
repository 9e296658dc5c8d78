"""depthwise.py's operators in Triton: y = a + bias + depthwise 5×5 of a, and its gradients.

A program has some pixels and a block of channels, and reads its neighbours through the cache. Sums
are float32. The gradient of `a` is the same kernel with the taps turned round. Source: arithmetic.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels.triton_pieces import launch, place, sums

_TAPS = 25
_RUN = 256  # pixels of one image that one program of the weight's gradient adds
_PIXELS = 16


def mix(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, split: bool) -> Tensor:
    """x: (B, H, W, C); weight: (C, 1, 5, 5); bias: (C,). See depthwise.mix."""
    batch, height, width, channels = x.shape
    shape = (4 * batch, height * width // 4, channels) if split else x.shape
    out = x.new_empty(shape)
    # perf: a GELU at each of 25 taps would cost more than writing it once and reading it.
    a = F.gelu(x) if gelu else x
    taps = weight.view(channels, _TAPS).t().contiguous()
    flags = {"split_in": False, "split_out": split, "has_bias": True, "slope": False}
    _launch(a, taps, bias, x, out, flags)
    return out


def mix_backward(
    grad: Tensor, x: Tensor, weight: Tensor, gelu: bool, split: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, in their dtypes."""
    batch, height, width, channels = x.shape
    of_x, a = torch.empty_like(x), F.gelu(x) if gelu else x
    taps = weight.view(channels, _TAPS).t().flip(0).contiguous()
    flags = {"split_in": split, "split_out": False, "has_bias": False, "slope": gelu}
    _launch(grad, taps, taps, x, of_x, flags)
    run = min(_RUN, triton.cdiv(height * width, _PIXELS) * _PIXELS)
    runs = triton.cdiv(height * width, run)
    parts = torch.empty((batch * runs, _TAPS + 1, channels), dtype=torch.float32, device=x.device)
    block = _block(channels)
    grid = (batch * runs, triton.cdiv(channels, block), 5)
    launch(
        _of_weight,
        grid,
        *(grad, a, parts, height, width, channels, runs),
        split=split,
        run=run,
        block_p=_PIXELS,
        block_c=block,
    )
    total = sums(parts.view(1, batch * runs, -1)).view(_TAPS + 1, channels).to(weight.dtype)
    return of_x, total[:_TAPS].t().contiguous().view(weight.shape), total[_TAPS].clone()


def _block(channels: int) -> int:
    return min(64, max(16, triton.next_power_of_2(channels)))


def _launch(
    a: Tensor, taps: Tensor, bias: Tensor, x: Tensor, out: Tensor, flags: dict[str, bool]
) -> None:
    batch, height, width, channels = x.shape
    pixels, block = batch * height * width, _block(channels)
    grid = (triton.cdiv(pixels, _PIXELS), triton.cdiv(channels, block))
    sizes = (pixels, height, width, channels)
    launch(_mix5, grid, a, taps, bias, x, out, *sizes, **flags, block_p=_PIXELS, block_c=block)


@triton.jit
def _mix5(
    a,
    taps,
    bias,
    x,
    out,
    pixels,
    height,
    width,
    channels,
    split_in: tl.constexpr,
    split_out: tl.constexpr,
    has_bias: tl.constexpr,
    slope: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * block_p + tl.arange(0, block_p)
    channel = tl.program_id(1) * block_c + tl.arange(0, block_c)
    there, some = pixel < pixels, channel < channels
    first = pixel // (height * width) * (height * width)
    row, column = (pixel - first) // width, (pixel - first) % width
    at = (first + place(row, column, height, width, split_in))[:, None] * channels + channel
    inside = there[:, None] & some[None, :]
    total = tl.load(a + at, inside, other=0.0).to(tl.float32)
    if has_bias:
        total += tl.load(bias + channel, some, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(25):
        r, c = row + tap // 5 - 2, column + tap % 5 - 2
        good = there & (r >= 0) & (r < height) & (c >= 0) & (c < width)
        near = (first + place(r, c, height, width, split_in))[:, None] * channels + channel
        value = tl.load(a + near, good[:, None] & some[None, :], other=0.0).to(tl.float32)
        weight = tl.load(taps + tap * channels + channel, some, other=0.0).to(tl.float32)
        # why: outside the image nothing is added, not 0 times a weight that is not finite.
        total += tl.where(good[:, None], value * weight[None, :], 0.0)
    if slope:
        here = pixel[:, None] * channels + channel
        v = tl.load(x + here, inside, other=0.0).to(tl.float32)
        share = 0.5 * (1.0 + tl.math.erf(v * 0.7071067811865476))
        total *= share + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
    to = (first + place(row, column, height, width, split_out))[:, None] * channels + channel
    tl.store(out + to, total.to(out.dtype.element_ty), inside)


@triton.jit
def _of_weight(
    grad,
    a,
    parts,
    height,
    width,
    channels,
    runs,
    split: tl.constexpr,
    run: tl.constexpr,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
):
    """One run of one image, one block of channels, one row of five taps; row 0 adds the bias."""
    part, down = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * block_c + tl.arange(0, block_c)
    some, pixels = channel < channels, height * width
    first = (part // runs).to(tl.int64) * pixels
    bias = tl.zeros((block_p, block_c), dtype=tl.float32)
    w0, w1, w2, w3, w4 = bias, bias, bias, bias, bias
    for step in range(0, run, block_p):
        pixel = (part % runs) * run + step + tl.arange(0, block_p)
        row, column, there = pixel // width, pixel % width, pixel < pixels
        at = (first + place(row, column, height, width, split))[:, None] * channels + channel
        g = tl.load(grad + at, there[:, None] & some[None, :], other=0.0).to(tl.float32)
        r = row + down - 2
        there = there & (r >= 0) & (r < height)
        line = (first + r * width + column)[:, None] * channels + channel
        bias += g
        w0 += _product(g, a, line, -2, column, width, channels, there, some)
        w1 += _product(g, a, line, -1, column, width, channels, there, some)
        w2 += _product(g, a, line, 0, column, width, channels, there, some)
        w3 += _product(g, a, line, 1, column, width, channels, there, some)
        w4 += _product(g, a, line, 2, column, width, channels, there, some)
    to = parts + part.to(tl.int64) * 26 * channels + channel
    tl.store(to + (down * 5) * channels, tl.sum(w0, 0), some)
    tl.store(to + (down * 5 + 1) * channels, tl.sum(w1, 0), some)
    tl.store(to + (down * 5 + 2) * channels, tl.sum(w2, 0), some)
    tl.store(to + (down * 5 + 3) * channels, tl.sum(w3, 0), some)
    tl.store(to + (down * 5 + 4) * channels, tl.sum(w4, 0), some)
    if down == 0:
        tl.store(to + 25 * channels, tl.sum(bias, 0), some)


@triton.jit
def _product(g, a, line, right, column, width, channels, there, some):
    good = there & (column + right >= 0) & (column + right < width)
    inside = good[:, None] & some[None, :]
    value = tl.load(a + line + right * channels, inside, other=0.0).to(tl.float32)
    return tl.where(inside, g * value, 0.0)
