"""All FP8 products of a model: who gets one, what is remembered of their maxima, who fell back.

A model says which of its products may run in FP8 (`fp8_products`, as it says its tensor plan);
`attach` gives these a `Product`. `Scaling` finds them again and moves their histories once a step.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.fp8.product import ATTENTION, OPERANDS, Product, Switch
from parallel.fp8.recipes import Backend, FP8Config, Recipe
from parallel.mesh import ALONE, Axis

PREFIX = "fp8."  # of the names in a checkpoint
LOST = 2.0**-12  # of the range; e4m3 reaches down to 2^-15 of its largest value, e5m2 to 2^-30


def attach(
    units: Sequence[nn.Module], cfg: FP8Config, backend: Backend, tp: Axis, device: torch.device
) -> None:
    """Gives every product that the units declare its FP8 state, but in the first and last units.

    tp: the axis that cuts the units' linears. Call it once they are cut, and before they are
    compiled.
    """
    switch = Switch()

    def fresh(operands: int, axis: Axis, recipe: Recipe) -> Product:
        past, seen = (torch.zeros(operands, device=device) for _ in range(2))
        return Product(recipe, cfg.margin, backend, cfg.history, switch, past, seen, axis)

    chosen = units[cfg.keep_first : len(units) - cfg.keep_last]
    modules: list[Any] = [module for unit in chosen for module in unit.modules()]
    for module in modules:
        for name in getattr(module, "fp8_products", ()):
            part = getattr(module, name)
            if isinstance(part, nn.Module):
                vars(part)["fp8"] = fresh(len(OPERANDS), tp, cfg.recipe)
            elif part is not None:
                module.fp8 = {**module.fp8, name: fresh(len(OPERANDS), ALONE, cfg.recipe)}
        if cfg.attention and hasattr(module, "fp8_attention"):
            # why: cuDNN's kernel on Hopper has no other; linears may have another beside it.
            module.fp8_attention = fresh(len(ATTENTION), ALONE, "delayed")


def products(model: nn.Module) -> dict[str, Product]:
    """By the name of the linear, attention, or tensor of experts that each belongs to."""
    found: dict[str, Product] = {}
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        held = getattr(module, "fp8", None) or {}
        found |= {name: held} if isinstance(held, Product) else _under(name, held)
        attention = getattr(module, "fp8_attention", None)
        found |= _under(name, {"attention": attention} if attention else {})
    return found


def _under(name: str, held: Mapping[str, Product]) -> dict[str, Product]:
    return {f"{name}.{own}": product for own, product in held.items()}


class Scaling:
    """Histories and fall-backs of all products of a model, none if it has none.

    A history's newest step is first. Scales are functions of it, so nothing else is saved.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.products = products(model)
        kept = {n: p for n, p in self.products.items() if p.recipe == "delayed"}
        steps = max((p.history for p in kept.values()), default=0)
        self._seen = [product.seen for product in kept.values()]
        self._past = [product.past for product in kept.values()]
        self._sizes = [len(product.past) for product in kept.values()]
        self._history = torch.zeros(sum(self._sizes), steps, device=device)
        self._names = [f"{PREFIX}{name}.history" for name in kept]
        self.chosen = False  # which products run in FP8 was decided, by a benchmark or by none
        self.gap: float | None = None  # of the loss, when the guard last looked

    @property
    def switch(self) -> Switch:
        return next(iter(self.products.values())).switch

    def maxima(self) -> Tensor:
        """This step's on this rank, (R,) float64."""
        return torch.cat([*self._seen, self._history.new_zeros(0)]).double()

    @torch.no_grad()
    def advance(self, maxima: Tensor, skip: Tensor) -> None:
        """Takes in the maxima of all ranks, (R,); skip, (): true leaves everything as it was."""
        if not self._seen:
            return
        known = torch.where(maxima.isfinite(), maxima, 0.0).to(self._history.dtype)
        moved = torch.cat([known[:, None], self._history[:, :-1]], dim=1)
        self._history.copy_(torch.where(skip, self._history, moved))
        self.loaded()

    @torch.no_grad()
    def loaded(self) -> None:
        """Scales follow the histories; nothing is seen yet of the next step."""
        if self._seen:
            torch._foreach_copy_(self._past, list(self._history.amax(1).split(self._sizes)))
            torch._foreach_zero_(self._seen)

    def tensors(self) -> dict[str, Tensor]:
        """Histories by layout-free name, (operands, steps) each; live."""
        return dict(zip(self._names, self._history.split(self._sizes), strict=True))

    def absent(self, stored: Mapping[str, Sequence[int]]) -> set[str]:
        """Names that a checkpoint does not hold, or with another length, which are emptied.

        stored: shapes of what it holds.
        """
        missing = {n for n, t in self.tensors().items() if tuple(stored.get(n, ())) != t.shape}
        for name in missing:
            self.tensors()[name].zero_()
        return missing

    def stale(self) -> list[str]:
        """Products with an operand whose last maximum is lost below what its scale allows for."""
        if not self._seen:
            return []
        last, past = self._history[:, 0], self._history.amax(1)
        lost = (last > 0) & (last < past * LOST)
        found = [bool(of_one.any()) for of_one in lost.cpu().split(self._sizes)]  # sync: on asking
        names = (name.removeprefix(PREFIX).removesuffix(".history") for name in self._names)
        return [name for name, is_lost in zip(names, found, strict=True) if is_lost]

    def metrics(self) -> dict[str, Any]:
        """What metrics.jsonl holds of FP8."""
        return {"fp8.gap": self.gap, "fp8.fallbacks": len(self.off)} if self.products else {}

    @property
    def off(self) -> list[str]:
        """Names of products that fell back to bf16."""
        return [name for name, product in self.products.items() if not product.on]

    def turn_off(self, names: Sequence[str]) -> None:
        """These run in bf16, all others in FP8."""
        for name, product in self.products.items():
            product.on = name not in names

    def scalars(self) -> dict[str, Any]:
        """What a checkpoint holds beside the histories, as JSON holds it."""
        gap = self.gap if self.gap is not None and math.isfinite(self.gap) else None
        return {"off": self.off, "chosen": self.chosen, "gap": gap}

    def take(self, scalars: Mapping[str, Any]) -> None:
        """Takes them back; what a checkpoint without FP8 does not hold is as at the start."""
        self.turn_off(scalars.get("off", []))
        self.chosen = scalars.get("chosen", False)
        self.gap = scalars.get("gap")
        self.loaded()

    def restart(self) -> None:
        """Forgets everything."""
        self._history.zero_()
        self.turn_off([])
        self.chosen, self.gap = False, None
        self.loaded()
