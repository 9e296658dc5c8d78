"""Attention within the four phase grids of a small image: one tile holds the tokens of all four.

At U-DiT's 8×8 stage a phase has 16 tokens, and a flash kernel pads each to a tile of 64 or more. On
a GPU, in Triton, the four are one tile of 64 with a mask. Elsewhere, and for larger grids, torch's
scaled dot product attention. Only q, k and v are kept for backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import (
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from parallel.kernels import gpu
from parallel.kernels.operators import fake, operator

# Tokens of an image. why: a tile of 128, for 10×10 pixels, has as many logits as four of 64.
_MOST = 64
_WIDEST = 128  # channels of a head


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale·QKᵀ)V of each token set. q, k, v: (S, nh, n, hd) -> the same.

    The sets come in fours, set 4·image + phase, see `split_phases`. scale: None is 1/√hd. In Triton
    for transposed views of (S, n, nh, hd), and so is the result. There one number that is not
    finite spoils its head in all four sets of the image.
    """
    if not fits(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    # why: the kernel reads and writes (S, n, nh, hd) as it lies, so that nothing is copied.
    given = [t.transpose(1, 2) for t in (q, k, v)]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(*given, factor).transpose(1, 2)


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the one tile takes these. q, k, v: (S, nh, n, hd)."""
    sets, _, tokens, size = q.shape
    return (
        sets % 4 == 0
        and 4 * tokens <= _MOST
        and size <= _WIDEST
        and q.shape == k.shape == v.shape
        and q.dtype == k.dtype == v.dtype
        and gpu.fits(*(t.transpose(1, 2) for t in (q, k, v)))
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.factor = factor
        return torch.ops.dit_pretrain.phase_attention(q, k, v, factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given = (grads[0], *ctx.saved_tensors, ctx.factor)
        return *torch.ops.dit_pretrain.phase_attention_backward(*given), None


@operator("phase_attention")
def _attention(q: Tensor, k: Tensor, v: Tensor, factor: float) -> Tensor:
    """q, k, v: (S, n, nh, hd) -> the same."""
    given = (t.contiguous() for t in (q, k, v))
    return gpu.kernels("phases").attention(*given, factor)


@operator("phase_attention_backward")
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    given = (t.contiguous() for t in (grad, q, k, v))
    return gpu.kernels("phases").attention_backward(*given, factor)


@fake("phase_attention")
def _(q: Tensor, k: Tensor, v: Tensor, factor: float) -> Tensor:
    return q.new_empty(q.shape)


@fake("phase_attention_backward")
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# Those of the four sets apart, as the twin's are counted: what the mask throws away is not work.
@register_flop_formula(torch.ops.dit_pretrain.phase_attention)
def _flops(q: torch.Size, *args: Any, **kwargs: Any) -> int:
    shape = _by_head(q)
    return sdpa_flop_count(shape, shape, shape)


@register_flop_formula(torch.ops.dit_pretrain.phase_attention_backward)
def _backward_flops(grad: torch.Size, *args: Any, **kwargs: Any) -> int:
    shape = _by_head(grad)
    return sdpa_backward_flop_count(shape, shape, shape, shape)


def _by_head(shape: torch.Size) -> tuple[int, int, int, int]:
    sets, tokens, heads, size = shape
    return sets, heads, tokens, size
