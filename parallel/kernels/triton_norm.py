"""norm.py's operators in Triton: the residual gate and the modulated norm behind it.

A program has some tokens of one image, whole, and computes in float32. x1 is rounded to its dtype
before its statistics, as the plain twins do. Source: arithmetic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels.triton_pieces import launch, place, sums

_RUN = 64  # tokens of one program


def forward(
    x: Tensor,
    out: Tensor | None,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
    results: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    width: int,
    eps: float,
) -> None:
    """Fills x1, h, mean and rstd. vectors: gate, shift, scale (B, C), rows equally far apart.

    Without out, no gate; without h, no norm. width: of an image whose out lies in phases, else 0.
    """
    given = [x if v is None else v for v in (out, *vectors, *results)]
    flags = {"gated": out is not None, "normed": results[1] is not None}
    _launch(_forward, x, (x, *given), vectors, width, flags, {"eps": eps})


def backward(
    grads: tuple[Tensor | None, Tensor | None],
    x1: Tensor,
    out: Tensor | None,
    vectors: tuple[Tensor | None, Tensor | None],
    stats: tuple[Tensor | None, Tensor | None],
    results: tuple[Tensor | None, Tensor | None],
    width: int,
) -> Tensor:
    """Fills the gradients of x and out; returns those of gate, shift and scale, (B, 3, C) float32.

    grads: of x1 and h; vectors: gate and scale; stats: mean and rstd. As in `forward`.
    """
    images, channels = x1.shape[0], x1.shape[-1]
    runs = triton.cdiv(x1[0, ..., 0].numel(), _RUN)
    parts = torch.zeros((images, runs, 3, channels), dtype=torch.float32, device=x1.device)
    given = [x1 if v is None else v for v in (*grads, x1, out, *vectors, *stats, *results)]
    flags = {
        "gated": out is not None,
        "normed": grads[1] is not None,
        "added": grads[0] is not None,
    }
    _launch(_backward, x1, (*given, parts), vectors, width, flags, {})
    return sums(parts.view(images, runs, -1)).reshape(images, 3, channels)


def _launch(kernel, x, given, vectors, width, flags, more) -> None:  # type: ignore[no-untyped-def]
    images, tokens, channels = x.shape[0], x[0, ..., 0].numel(), x.shape[-1]
    block = triton.next_power_of_2(channels)
    rows = max(1, min(16, 2048 // block))
    runs = triton.cdiv(tokens, _RUN)
    stride = next(v.stride(0) for v in vectors if v is not None)
    sizes = (tokens, channels, runs, stride, max(width, 1))
    flags = flags | {"split": width > 0, "run": _RUN, "block_r": rows, "block_c": block}
    launch(kernel, (images * runs,), *given, *sizes, **more, **flags)


@triton.jit
def _forward(
    x,
    out,
    gate,
    shift,
    scale,
    x1,
    h,
    mean,
    rstd,
    tokens,
    channels,
    runs,
    stride,
    width,
    eps,
    gated: tl.constexpr,
    normed: tl.constexpr,
    split: tl.constexpr,
    run: tl.constexpr,
    block_r: tl.constexpr,
    block_c: tl.constexpr,
):
    image = (tl.program_id(0) // runs).to(tl.int64)
    c = tl.arange(0, block_c)
    some = c < channels
    last = tl.minimum((tl.program_id(0) % runs + 1) * run, tokens)
    for first in range(tl.program_id(0) % runs * run, last, block_r):
        token = first + tl.arange(0, block_r)
        there = token < tokens
        inside = there[:, None] & some[None, :]
        at = (image * tokens + token)[:, None] * channels + c
        value = tl.load(x + at, inside, other=0.0).to(tl.float32)
        if gated:
            where = place(token // width, token % width, tokens // width, width, split)
            near = (image * tokens + where)[:, None] * channels + c
            g = tl.load(gate + image * stride + c, some, other=0.0).to(tl.float32)
            value += g[None, :] * tl.load(out + near, inside, other=0.0).to(tl.float32)
            rounded = value.to(x1.dtype.element_ty)
            tl.store(x1 + at, rounded, inside)
            value = rounded.to(tl.float32)
        if normed:
            middle = tl.sum(value, 1) / channels
            value = tl.where(some[None, :], value - middle[:, None], 0.0)
            r = 1.0 / tl.sqrt(tl.sum(value * value, 1) / channels + eps)
            tl.store(mean + image * tokens + token, middle, there)
            tl.store(rstd + image * tokens + token, r, there)
            a = 1.0 + tl.load(scale + image * stride + c, some, other=0.0).to(tl.float32)
            b = tl.load(shift + image * stride + c, some, other=0.0).to(tl.float32)
            value = value * r[:, None] * a[None, :] + b[None, :]
            tl.store(h + at, value.to(h.dtype.element_ty), inside)


@triton.jit
def _backward(
    grad_x1,
    grad_h,
    x1,
    out,
    gate,
    scale,
    mean,
    rstd,
    of_x,
    of_out,
    parts,
    tokens,
    channels,
    runs,
    stride,
    width,
    gated: tl.constexpr,
    normed: tl.constexpr,
    added: tl.constexpr,
    split: tl.constexpr,
    run: tl.constexpr,
    block_r: tl.constexpr,
    block_c: tl.constexpr,
):
    image = (tl.program_id(0) // runs).to(tl.int64)
    c = tl.arange(0, block_c)
    some = c < channels
    to_gate = tl.zeros((block_c,), dtype=tl.float32)
    to_shift, to_scale = to_gate, to_gate
    last = tl.minimum((tl.program_id(0) % runs + 1) * run, tokens)
    for first in range(tl.program_id(0) % runs * run, last, block_r):
        token = first + tl.arange(0, block_r)
        there = token < tokens
        inside = there[:, None] & some[None, :]
        at = (image * tokens + token)[:, None] * channels + c
        total = tl.zeros((block_r, block_c), dtype=tl.float32)
        if normed:
            r = tl.load(rstd + image * tokens + token, there, other=0.0)[:, None]
            middle = tl.load(mean + image * tokens + token, there, other=0.0)[:, None]
            unit = tl.load(x1 + at, inside, other=0.0).to(tl.float32) - middle
            unit = tl.where(some[None, :], unit * r, 0.0)
            g = tl.load(grad_h + at, inside, other=0.0).to(tl.float32)
            to_shift += tl.sum(g, 0)
            to_scale += tl.sum(g * unit, 0)
            g *= 1.0 + tl.load(scale + image * stride + c, some, other=0.0).to(tl.float32)[None, :]
            level = tl.sum(g, 1)[:, None] / channels
            along = tl.sum(g * unit, 1)[:, None] / channels
            total = (g - level - unit * along) * r
        if added:
            total += tl.load(grad_x1 + at, inside, other=0.0).to(tl.float32)
        if normed:
            tl.store(of_x + at, total.to(of_x.dtype.element_ty), inside)
        if gated:
            where = place(token // width, token % width, tokens // width, width, split)
            near = (image * tokens + where)[:, None] * channels + c
            to_gate += tl.sum(total * tl.load(out + near, inside, other=0.0).to(tl.float32), 0)
            total *= tl.load(gate + image * stride + c, some, other=0.0).to(tl.float32)[None, :]
            tl.store(of_out + near, total.to(of_out.dtype.element_ty), inside)
    to = parts + tl.program_id(0).to(tl.int64) * 3 * channels + c
    tl.store(to, to_gate, some)
    tl.store(to + channels, to_shift, some)
    tl.store(to + 2 * channels, to_scale, some)
