"""softmax(QKᵀ)V in FP8: Transformer Engine and cuDNN on Hopper, an emulation elsewhere."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.fp8 import transformer_engine
from parallel.fp8.product import (
    GRADIENT,
    INPUTS,
    LOGITS,
    OUT,
    TO_INPUTS,
    How,
    Product,
    maximum,
    quantise,
)
from parallel.fp8.recipes import E4M3, E5M2, Quantised, by_history, whole
from parallel.kernels.phases import attention as phase_attention


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    product: Product | None,
    phases: bool = False,
) -> Tensor:
    """Scaled dot product attention, in FP8 if the product is on. (B, nh, N, hd) -> the same.

    scale: of the logits; None: 1/√hd. phases: the token sets are the phase grids of images.
    """
    plain = phase_attention if phases else F.scaled_dot_product_attention
    if product is None or not (product.in_fp8 or product.measures):
        return plain(q, k, v, scale=scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    out = _apply(q, k, v, factor, product)
    if product.measures:
        exact = plain(q, k, v, scale=scale)
        product.compare(exact, out)
        return exact
    return out


def _apply(q: Tensor, k: Tensor, v: Tensor, factor: float, product: Product) -> Tensor:
    if product.backend == "transformer_engine":
        return transformer_engine.attention(q, k, v, factor, product)
    return _Attend.apply(q, k, v, factor, product.past, product.seen, How.of(product))


class _Attend(torch.autograd.Function):
    """What cuDNN's kernel rounds, rounded: q, k and v with one scale, probabilities, the output,
    and all gradients.

    Probabilities are at most 1, so their scale is known. The whole table of logits is held: this is
    an emulation. Source: FlashAttention's backward; Transformer Engine's quantizers for the rest.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        factor: float,
        past: Tensor,
        seen: Tensor,
        how: How,
    ) -> Tensor:
        now = maximum(torch.stack([t.abs().amax() for t in (q, k, v)]), INPUTS, seen, how, None)
        q8, k8, v8 = (by_history(t, E4M3, past[INPUTS], now, how.margin) for t in (q, k, v))
        probs = _probabilities(q8, k8, factor)
        out = _rounded(probs, v.dtype) @ v8.plain(v.dtype)
        out = quantise(out, OUT, E4M3, past, seen, how).plain(v.dtype)
        ctx.factor, ctx.how, ctx.dtype = factor, how, q.dtype
        kept = [tensor for eight in (q8, k8, v8) for tensor in (eight.data, eight.inverse)]
        ctx.save_for_backward(*kept, past, seen)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *kept, past, seen = ctx.saved_tensors
        how, dtype = ctx.how, ctx.dtype
        q8, k8, v8 = (Quantised(d, i, d.shape) for d, i in zip(kept[::2], kept[1::2], strict=True))
        grad = quantise(grads[0], GRADIENT, E5M2, past, seen, how).plain(dtype)
        probs = _probabilities(q8, k8, ctx.factor)
        to_probs = (grad @ v8.plain(dtype).transpose(-2, -1)).float()
        # why: Σ_j p·dp of a row, which flash attention takes as Σ out·dout.
        inner = (to_probs * probs).sum(-1, keepdim=True)
        to_logits = (probs * (to_probs - inner) * ctx.factor).to(dtype)
        to_logits = quantise(to_logits, LOGITS, E5M2, past, seen, how).plain(dtype)
        to_q = to_logits @ k8.plain(dtype)
        to_k = to_logits.transpose(-2, -1) @ q8.plain(dtype)
        to_v = _rounded(probs, dtype).transpose(-2, -1) @ grad
        of_all = torch.stack([t.abs().amax() for t in (to_q, to_k, to_v)])
        now = maximum(of_all, TO_INPUTS, seen, how, None)
        to = (by_history(t, E5M2, past[TO_INPUTS], now, how.margin) for t in (to_q, to_k, to_v))
        return *(t.plain(dtype) for t in to), None, None, None, None


def _probabilities(q: Quantised, k: Quantised, factor: float) -> Tensor:
    logits = q.plain(torch.float32) @ k.plain(torch.float32).transpose(-2, -1)
    return (logits * factor).softmax(-1)


def _rounded(probs: Tensor, dtype: torch.dtype) -> Tensor:
    return whole(probs, E4M3, torch.ones((), device=probs.device)).plain(dtype)
