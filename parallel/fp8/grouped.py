"""Expert products in FP8: each run of rows with its own expert's matrix.

    y = grouped(rows, weight, counts, product)   # product None: parallel.experts.grouped_mm

Scales: delayed has one for a layer's tensor of all experts, current one an expert and one for the
rows; block has one a row, and in the weight's gradient one a feature, because torch's scaled
grouped product knows rows and no tiles.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parallel.experts import grouped_mm
from parallel.fp8 import recipes
from parallel.fp8.multiply import multiply_grouped, multiply_grouped_weight
from parallel.fp8.product import G, How, Product, W, X, quantise
from parallel.fp8.recipes import E4M3, E5M2, Quantised


def grouped(x: Tensor, weight: Tensor, counts: Tensor, product: Product | None) -> Tensor:
    """`grouped_mm`, in FP8 if the product is on; weight: this rank's experts, in the dtype of x."""
    if product is None or not (product.in_fp8 or product.measures):
        return grouped_mm(x, weight, counts)
    out = _apply(x, weight, counts, product)
    if product.measures:
        plain = grouped_mm(x, weight, counts)
        product.compare(plain, out)
        product.shapes.add((x.shape[0], *weight.shape[1:], weight.shape[0]))
        return plain
    return out


def _apply(x: Tensor, weight: Tensor, counts: Tensor, product: Product) -> Tensor:
    how = How.of(product)
    if how.backend == "transformer_engine":  # why: said there
        how = replace(how, backend="torch")
    return _Grouped.apply(x, weight, counts, product.past, product.seen, how)


class _Grouped(torch.autograd.Function):
    """Keeps the rows in float8 and the weight as it came: what an engine gathered it frees."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, past: Tensor, seen: Tensor, how: How
    ) -> Tensor:
        ctx.how, ctx.dtypes = how, (x.dtype, weight.dtype)
        if how.recipe == "block":
            ours, theirs = (recipes.rows(a, E4M3, how.margin) for a in (x, weight))
            kept = recipes.rows(x.t(), E4M3, how.margin)
        else:
            kept = ours = quantise(x, X, E4M3, past, seen, how)
            theirs = _weight(weight, past, seen, how)
        ctx.save_for_backward(kept.data, kept.inverse, weight, counts, past, seen)
        return multiply_grouped(ours, theirs, counts, x.dtype, how.backend, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        data, inverse, weight, counts, past, seen = ctx.saved_tensors
        how, grad = ctx.how, grads[0]
        kept = Quantised(data, inverse, data.shape)
        to_x = to_weight = None
        blocks = how.recipe == "block"
        ours = None if blocks else quantise(grad, G, E5M2, past, seen, how)
        if ctx.needs_input_grad[0]:
            if blocks:
                theirs = recipes.rows(weight.transpose(1, 2), E4M3, how.margin)
            else:
                theirs = _weight(weight, past, seen, how).t()
            left = ours or recipes.rows(grad, E4M3, how.margin)
            to_x = multiply_grouped(left, theirs, counts, ctx.dtypes[0], how.backend, fast=False)
        if ctx.needs_input_grad[1]:
            left = recipes.rows(grad.t(), E4M3, how.margin) if ours is None else ours.t()
            right = kept if blocks else kept.t()
            to_weight = multiply_grouped_weight(
                left, right, counts, weight.shape[0], ctx.dtypes[1], how.backend
            )
        return to_x, to_weight, None, None, None, None


def _weight(weight: Tensor, past: Tensor, seen: Tensor, how: How) -> Quantised:
    """(E, N, K): one scale from the history, or one an expert."""
    if how.recipe == "delayed":
        return quantise(weight, W, E4M3, past, seen, how)
    amax = weight.detach().abs().amax((1, 2), keepdim=True).float()
    return recipes.whole(weight, E4M3, amax, how.margin)
