"""Cosine heads: rotary turn, length one, times a scale for each head, in one pass each way.

Computed in float32, because the logits are up to 100 times the rounding of q and k. In C for
float32 on a CPU, in Triton on a GPU; else plain torch operators. Only what came in is kept for
backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.kernels import gpu, native
from parallel.kernels.operators import fake, operator

_WIDEST = 512  # channels of a head, as in heads.c
_ROWS = 64  # as in heads.c


def cosine_heads(x: Tensor, rope: Tensor | None, scale: Tensor | None) -> Tensor:
    """x: (B, N, nh, hd) turned by its token, of length one, times scale. The same shape and dtype.

    rope: (2, N, hd/2), see `rotate`, or None for no turn; scale: (nh,) float32, None for 1.
    """
    if torch.compiler.is_compiling():
        return plain(x, rope, scale)
    table = None if rope is None else _table(rope)
    return _Heads.apply(x, table, scale)


def plain(x: Tensor, rope: Tensor | None, scale: Tensor | None) -> Tensor:
    """The same in torch operators."""
    wide = x.float() if rope is None else rotate(x, rope)
    wide = F.normalize(wide, dim=-1)
    return (wide if scale is None else wide * scale[:, None]).to(x.dtype)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn adjacent channel pairs (2j, 2j+1). x: (B, N, nh, hd) -> the same, float32."""
    cos, sin = rope.float()[:, None, :, None].unbind(0)  # (1, N, 1, hd/2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _table(rope: Tensor) -> Tensor:
    """(2, N, hd/2) -> (2, N, hd): what a channel and its neighbour are multiplied with."""
    cos, sin = rope.float().unbind(0)
    return torch.stack(
        [torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)]
    )


def _turn(x: Tensor, table: Tensor | None, back: bool = False) -> Tensor:
    x = x.float()
    if table is None:
        return x
    cosine, sine = table[:, None, :, None].unbind(0)
    neighbour = (x * sine if back else x).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return x * cosine + (neighbour if back else neighbour * sine)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor | None, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, table, scale)
        return torch.ops.dit_pretrain.cosine_heads(x, table, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        x, table, scale = ctx.saved_tensors
        of_x, of_scale = torch.ops.dit_pretrain.cosine_heads_backward(grads[0], x, table, scale)
        return of_x, None, None if scale is None else of_scale


def _fits(*given: Tensor | None) -> bool:
    return given[0].shape[-1] <= _WIDEST and native.fits(*given)  # type: ignore[union-attr]


@operator("cosine_heads")
def _heads(x: Tensor, table: Tensor | None, scale: Tensor | None) -> Tensor:
    x = x.contiguous()
    if table is not None and x.shape[-1] <= _WIDEST and gpu.fits(x, table, scale):
        return gpu.kernels("heads").heads(x, table, scale)
    if table is None or not _fits(x, table, scale):
        wide = F.normalize(_turn(x, table), dim=-1)
        return (wide if scale is None else wide * scale[:, None]).to(x.dtype, copy=True)
    out = torch.empty_like(x)
    batch, tokens, heads, size = x.shape
    native.call("cosine_heads", x, table, scale, out, batch * tokens, tokens, heads, size)
    return out


@operator("cosine_heads_backward")
def _heads_backward(
    grad: Tensor, x: Tensor, table: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of scale (nh,)."""
    grad, x = grad.contiguous(), x.contiguous()
    batch, tokens, heads, size = x.shape
    if table is not None and size <= _WIDEST and gpu.fits(grad, x, table, scale):
        return gpu.kernels("heads").heads_backward(grad, x, table, scale)
    if table is None or not _fits(x, grad, table, scale):
        turned, wide = _turn(x, table), grad.float()
        length = turned.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        unit = turned / length
        along = (unit * wide).sum(-1, keepdim=True)
        by = 1.0 if scale is None else scale[:, None]
        of_x = _turn((wide - unit * along) * by / length, table, back=True)
        return of_x.to(x.dtype, copy=True), along.sum((0, 1, 3))
    of_x, of_scale = torch.empty_like(x), torch.empty(heads)
    parts = torch.empty(-(-batch * tokens // _ROWS), heads)
    sizes = (batch * tokens, tokens, heads, size)
    given = (grad, x, table, scale, of_x, of_scale, parts)
    native.call("cosine_heads_backward", *given, *sizes)
    return of_x, of_scale


@fake("cosine_heads")
def _(x: Tensor, table: Tensor | None, scale: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@fake("cosine_heads_backward")
def _(grad: Tensor, x: Tensor, table: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return of_x, torch.empty(x.shape[2], dtype=torch.float32, device=x.device)
