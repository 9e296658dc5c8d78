"""Whether FP8 costs anything: compared with bf16 on a schedule, and who falls back if it does.

A micro-batch passes twice, without gradients: once in bf16, every product being compared with what
FP8 makes of the same input; once in FP8. A product that stands out falls back by name. If the loss
is then still too far from bf16's, the worst products follow until it is not. A scale of a gradient
shows in its history alone. Decisions are the same on all ranks and part of the checkpoint.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from parallel.fp8 import choice
from parallel.fp8.product import Product
from parallel.fp8.recipes import FP8Config
from parallel.reduce import ordered_sum
from pretrain.schedules import every
from pretrain.state import TrainState

# Two roundings to e4m3 leave about 4 % of a product: sqrt(2)·2^-4/sqrt(3)·0.73.
STANDS_OUT = 0.2  # relative error that no healthy product has
TIMES = 4.0  # and how many times the median


class FP8Guard:
    """Watches the products of one state. Every rank calls `check` before every step."""

    def __init__(
        self,
        cfg: FP8Config,
        state: TrainState,
        loss: Callable[[Batch], Tensor],
        say: Callable[[str], None],
    ) -> None:
        """loss: of a batch over all ranks, without gradients."""
        self._cfg, self._state, self._loss, self._say = cfg, state, loss, say

    @property
    def _products(self) -> dict[str, Product]:
        return self._state.fp8.products

    def check(self, batch: Batch) -> None:
        """Before the step that reads `batch`."""
        if not self._products:
            return
        if not self._state.fp8.chosen:
            self._choose(batch)
        step, often = self._state.step, self._cfg.guard_every
        if often is not None and (step == 1 or every(often, step)):
            self._compare(batch)

    def _choose(self, batch: Batch) -> None:
        """Once a run: which products are worth it on this machine."""
        scaling = self._state.fp8
        backend = next(iter(self._products.values())).backend
        words = f"precision=fp8: {len(self._products)} products, {self._cfg.recipe} scaling"
        if backend == "emulated":
            self._say(f"{words}. This is an emulation: the numbers are FP8's, the speed is not")
        else:
            with self._mode("measure"):
                self._loss(batch)  # why: shapes are known once a batch has passed
            self._errors()  # why: nobody needs these
            slow = choice.too_slow(self._products, self._say)
            scaling.turn_off(slow)
            self._say(
                f"{words}, by {backend}; {len(slow)} stay in bf16, which is faster there: "
                f"{', '.join(slow) or 'none'}"
            )
        scaling.chosen = True

    def _compare(self, batch: Batch) -> None:
        scaling, limit = self._state.fp8, self._cfg.guard_limit
        if len(scaling.off) == len(self._products):
            return
        with self._mode("measure"):
            plain = float(self._loss(batch))  # sync: the guard's own schedule
        errors = self._errors()
        if not math.isfinite(plain):
            return  # why: a model that is broken in bf16 says nothing about FP8
        self._fall_back(
            [name for name in scaling.stale() if name in errors],
            "a scale allows for values that are long past, and loses those of now",
        )
        odd = standing_out(errors)
        off = ", ".join(f"{errors[name]:.2g}" for name in odd)
        self._fall_back(odd, f"their outputs are off by {off} of their size")
        scaling.gap = self._gap(batch, plain)
        for names in worst_first(errors, scaling.off):
            if scaling.gap <= limit:
                break
            self._fall_back(names, f"the loss is {scaling.gap:.2%} from bf16's, above {limit:.2%}")
            scaling.gap = self._gap(batch, plain)

    def _gap(self, batch: Batch, plain: float) -> float:
        with self._mode("fp8"):
            ours = float(self._loss(batch))  # sync: the guard's own schedule
        return abs(ours - plain) / abs(plain) if math.isfinite(ours) else math.inf

    def _fall_back(self, names: list[str], reason: str) -> None:
        scaling = self._state.fp8
        new = [name for name in names if name not in scaling.off]
        if new:
            scaling.turn_off([*scaling.off, *new])
            # why: a compiled block with another choice is another graph.
            torch._dynamo.config.recompile_limit += len(new)
            step = self._state.step
            self._say(f"fp8, step {step}: back to bf16: {', '.join(new)}: {reason}")

    def _errors(self) -> dict[str, float]:
        """Relative error of each product's output over all ranks, since the last call."""
        found = {n: p.compared for n, p in self._products.items() if p.on}
        none = torch.zeros(2, dtype=torch.float64, device=self._state.backend.device)
        sums = torch.stack([torch.stack([none, *of_one]).sum(0) for of_one in found.values()])
        for of_one in found.values():
            of_one.clear()
        total = ordered_sum(sums.flatten()).view(-1, 2)  # dist: every rank, on the schedule
        error = (total[:, 0] / total[:, 1].clamp(min=1e-60)).sqrt().tolist()
        return dict(zip(found, error, strict=True))

    @contextmanager
    def _mode(self, mode: str) -> Iterator[None]:
        """Inside, products do this, uncompiled: no graph is made for a look."""
        switch = self._state.fp8.switch
        switch.mode = mode  # type: ignore[assignment]
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            switch.mode = "train"


def standing_out(errors: Mapping[str, float]) -> list[str]:
    """Products whose error no rounding explains. errors: of each output, relative."""
    known = sorted(error for error in errors.values() if math.isfinite(error))
    median = known[len(known) // 2] if known else 0.0
    limit = max(STANDS_OUT, TIMES * median)
    return [name for name, error in errors.items() if not error <= limit]


def worst_first(errors: Mapping[str, float], off: Sequence[str]) -> Iterator[list[str]]:
    """The products that are on, those of the largest errors first, each time twice as many."""
    rest = sorted(errors.keys() - off, key=lambda name: (-errors[name], name))
    many = 1
    while rest:
        yield rest[:many]
        rest, many = rest[many:], 2 * many
