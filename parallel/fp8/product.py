"""One matrix product that may run in FP8: its scales, its switch, and how it makes one scale.

A product runs in FP8 where gradients are recorded: what is only looked at (samples, scores) is
computed in the dtype of its input.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.fp8 import recipes
from parallel.fp8.recipes import Backend, Quantised, Recipe
from parallel.mesh import ALONE, Axis

X, W, G = 0, 1, 2  # operands: input, weight, gradient of the output
OPERANDS = ("input", "weight", "gradient")
# Of an attention: q, k and v together; its output; gradients of output, of logits, of q, k and v.
ATTENTION = ("inputs", "output", "gradient", "to_logits", "to_inputs")
INPUTS, OUT, GRADIENT, LOGITS, TO_INPUTS = range(5)


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


def quantise(
    x: Tensor,
    operand: int,
    fmt: torch.dtype,
    past: Tensor,
    seen: Tensor,
    how: How,
    axis: Axis | None = None,
) -> Quantised:
    """x with one scale, of the history or of its own maximum, which is noted where asked for.

    axis: of which each rank holds a share of x.
    """
    now = maximum(x, operand, seen, how, axis)
    if how.recipe == "delayed":
        return recipes.by_history(x, fmt, past[operand], now, how.margin)
    return recipes.whole(x, fmt, now, how.margin)


def maximum(x: Tensor, operand: int, seen: Tensor, how: How, axis: Axis | None) -> Tensor:
    """The largest magnitude of x, (), noted for the history or taken over the axis."""
    now = recipes.largest(x)
    if how.notes:
        note(seen, now, operand)
    if how.recipe == "current" and axis is not None and axis.size > 1:
        dist.all_reduce(now, dist.ReduceOp.MAX, group=axis.group)  # dist: the axis, a number each
    return now


@torch.library.custom_op("dit_pretrain::note", mutates_args=("seen",))
def note(seen: Tensor, now: Tensor, operand: int) -> None:
    """seen[operand] becomes the larger of the two; twice the same is the same.

    Why an operator: a compiled graph must not lose or move what it writes in backward.
    """
    seen[operand] = torch.maximum(seen[operand], now)
