"""One matrix product that may run in FP8: its scales, its switch, and the linear itself.

    y = linear(x, weight, bias, product)         # product None: a plain linear

x and weight are e4m3; gradients are e5m2, or e4m3 in tiles. A product runs in FP8 where gradients
are recorded: what is only looked at (samples, scores) is computed in the dtype of its input.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel.fp8 import recipes
from parallel.fp8.multiply import multiply
from parallel.fp8.recipes import E4M3, E5M2, TILE, Backend, Quantised, Recipe
from parallel.mesh import ALONE, Axis

X, W, G = 0, 1, 2  # operands: input, weight, gradient of the output
OPERANDS = ("input", "weight", "gradient")
ATTENTION = ("q", "k", "v", "gradient", "logits")  # of an attention; the last is their gradient


@dataclass
class Switch:
    """What all products of a model do at the moment; the guard turns it."""

    # train: as the module says; plain: none in FP8; fp8: all that are on, nothing is recorded;
    # measure: computed plainly, and what FP8 would have made of it is compared
    mode: Literal["train", "plain", "fp8", "measure"] = "train"


@dataclass(eq=False)
class Product:
    """Scales of one product, as tensors that only `scaling.Scaling` and this module write."""

    recipe: Recipe
    margin: int
    backend: Backend
    history: int  # delayed: steps that a maximum is remembered
    switch: Switch
    past: Tensor  # (operands,) float32: maxima over the history, 0 where there is none
    seen: Tensor  # the same: maxima of this step
    axis: Axis = ALONE  # that cuts the weight
    on: bool = True  # false: fell back to bf16
    compared: list[Tensor] = field(default_factory=list)  # (2,) each: squares of error and output
    shapes: set[tuple[int, ...]] = field(default_factory=set)  # (M, N, K[, E]) met in `measure`

    @property
    def in_fp8(self) -> bool:
        mode = self.switch.mode
        return self.on and (torch.is_grad_enabled() if mode == "train" else mode == "fp8")

    @property
    def measures(self) -> bool:
        return self.on and self.switch.mode == "measure"

    @property
    def notes(self) -> bool:
        """Whether maxima are recorded."""
        return self.recipe == "delayed" and self.switch.mode == "train"

    def compare(self, plain: Tensor, ours: Tensor) -> None:
        """Keeps how far FP8 is from the plain output."""
        plain, ours = plain.detach().double(), ours.detach().double()
        self.compared.append(torch.stack([(ours - plain).square().sum(), plain.square().sum()]))


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
        from parallel.fp8 import transformer_engine

        return transformer_engine.linear(rows, weight, product)
    return _Linear.apply(rows, weight, product.past, product.seen, How.of(product))


@dataclass(frozen=True)
class How:
    """What the forward of a product decides for its backward too."""

    recipe: Recipe
    margin: int
    backend: Backend
    notes: bool
    axis: Axis

    @staticmethod
    def of(product: Product) -> "How":
        return How(product.recipe, product.margin, product.backend, product.notes, product.axis)


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


def quantise(
    x: Tensor,
    operand: int,
    fmt: torch.dtype,
    past: Tensor,
    seen: Tensor,
    how: Any,
    axis: Axis = ALONE,
) -> Quantised:
    """x with one scale, of the history or of its own maximum, which is noted where asked for.

    how: has recipe, margin, notes. axis: of which each rank holds a share of x.
    """
    now = recipes.largest(x)
    if how.recipe == "delayed":
        if how.notes:
            note(seen, now, operand)
        return recipes.by_history(x, fmt, past[operand], now, how.margin)
    if axis.size > 1:
        dist.all_reduce(now, dist.ReduceOp.MAX, group=axis.group)  # dist: the axis, a number each
    return recipes.whole(x, fmt, now, how.margin)


@torch.library.custom_op("dit_pretrain::note", mutates_args=("seen",))
def note(seen: Tensor, now: Tensor, operand: int) -> None:
    """seen[operand] becomes the larger of the two; twice the same is the same.

    Why an operator: a compiled graph must not lose or move what it writes in backward.
    """
    seen[operand] = torch.maximum(seen[operand], now)
