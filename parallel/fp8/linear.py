"""A linear in FP8.

    y = linear(x, weight, bias, product)         # product None: a plain linear

x and weight are e4m3; gradients are e5m2, or e4m3 in tiles.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.fp8 import recipes, transformer_engine
from parallel.fp8.multiply import multiply
from parallel.fp8.product import G, How, Product, W, X, quantise
from parallel.fp8.recipes import E4M3, E5M2, TILE, Quantised


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, product: Product | None) -> Tensor:
    """F.linear, in FP8 if the product is on. x: (..., K); weight: (N, K), the share of this rank,
    in the dtype of x -> (..., N).
    """
    if product is None or not (product.in_fp8 or product.measures):
        return F.linear(x, weight, bias)
    out = _apply(x.reshape(-1, x.shape[-1]), weight, product).view(*x.shape[:-1], -1)
    out = out if bias is None else out + bias
    if product.measures:
        plain = F.linear(x, weight, bias)
        product.compare(plain, out)
        product.shapes.add((x.numel() // x.shape[-1], *weight.shape))
        return plain
    return out


def _apply(rows: Tensor, weight: Tensor, product: Product) -> Tensor:
    if product.backend == "transformer_engine":
        return transformer_engine.linear(rows, weight, product)
    return _Linear.apply(rows, weight, product.past, product.seen, How.of(product))


class _Linear(torch.autograd.Function):
    """Keeps the input in float8 and the weight as it came: what an engine gathered it frees."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, past: Tensor, seen: Tensor, how: How
    ) -> Tensor:
        ctx.how, ctx.dtypes = how, (x.dtype, weight.dtype)
        if how.recipe == "block":
            ours = recipes.tiles(x, E4M3, (1, TILE), how.margin)
            theirs = recipes.tiles(weight, E4M3, (TILE, TILE), how.margin)
            kept = recipes.tiles(x.t(), E4M3, (1, TILE), how.margin)
            ctx.tile, ctx.kept = kept.tile, kept.shape
            ctx.save_for_backward(kept.data, kept.inverse, weight, past, seen)
        else:
            ours = quantise(x, X, E4M3, past, seen, how)
            theirs = quantise(weight, W, E4M3, past, seen, how, how.axis)
            # why: the scale of the weight too, so that both passes see the same numbers.
            ctx.save_for_backward(ours.data, ours.inverse, weight, past, seen, 1.0 / theirs.inverse)
        return multiply(ours, theirs, x.dtype, how.backend, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        how: How = ctx.how
        backward = _tiled_backward if how.recipe == "block" else _whole_backward
        return *backward(ctx, grads[0], how), None, None, None


def _whole_backward(ctx: Any, grad: Tensor, how: How) -> tuple[Tensor | None, Tensor | None]:
    data, inverse, weight, past, seen, scale = ctx.saved_tensors
    to_x = to_weight = None
    ours = quantise(grad, G, E5M2, past, seen, how)
    if ctx.needs_input_grad[0]:
        theirs = Quantised(recipes.cast(weight, scale, E4M3), 1.0 / scale, weight.shape)
        to_x = multiply(ours, theirs.t(), ctx.dtypes[0], how.backend, fast=False)
    if ctx.needs_input_grad[1]:
        kept = Quantised(data, inverse, data.shape)
        to_weight = multiply(ours.t(), kept.t(), ctx.dtypes[1], how.backend, fast=False)
    return to_x, to_weight


def _tiled_backward(ctx: Any, grad: Tensor, how: How) -> tuple[Tensor | None, Tensor | None]:
    data, inverse, weight, _, _ = ctx.saved_tensors
    to_x = to_weight = None
    if ctx.needs_input_grad[0]:
        ours = recipes.tiles(grad, E4M3, (1, TILE), how.margin)
        theirs = recipes.tiles(weight.t(), E4M3, (TILE, TILE), how.margin)
        to_x = multiply(ours, theirs, ctx.dtypes[0], how.backend, fast=False)
    if ctx.needs_input_grad[1]:
        ours = recipes.tiles(grad.t(), E4M3, (1, TILE), how.margin)
        kept = Quantised(data, inverse, ctx.kept, ctx.tile)
        to_weight = multiply(ours, kept, ctx.dtypes[1], how.backend, fast=False)
    return to_x, to_weight
