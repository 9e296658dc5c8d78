"""Whether FP8 costs anything: the loss against bf16, on a schedule, and who falls back if it does.

The same micro-batch is computed with FP8 and without, no gradients. Above the limit every product
is compared with bf16 on the same input; those that stand out fall back by name, or else the worst,
until the gap is small. A scale of a gradient shows in its history alone. Decisions are the same on
all ranks and part of the checkpoint.
"""

import math
from collections.abc import Callable, Iterator, Mapping
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
        step = self._state.step
        if step == 1 or every(self._cfg.guard_every, step):
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
        scaling = self._state.fp8
        stale = [name for name in scaling.stale() if name not in scaling.off]
        self._fall_back(stale, "their scales allow for what is long past")
        with self._mode("plain"):
            plain = float(self._loss(batch))  # sync: the guard's own schedule
        scaling.gap = self._gap(batch, plain)
        if scaling.gap <= self._cfg.guard_limit or not math.isfinite(plain):
            return
        with self._mode("measure"):
            self._loss(batch)
        errors = self._errors()
        found = scaling.gap
        for names in blamed(errors):
            self._fall_back(
                names,
                f"the loss is {found:.2%} from bf16's, more than {self._cfg.guard_limit:.2%}, and "
                f"their outputs by {', '.join(f'{errors[n]:.2g}' for n in names)} of themselves",
            )
            scaling.gap = self._gap(batch, plain)
            if scaling.gap <= self._cfg.guard_limit:
                break
        self._say(f"fp8: with them in bf16 the gap of the loss is {scaling.gap:.3%}")

    def _gap(self, batch: Batch, plain: float) -> float:
        with self._mode("fp8"):
            ours = float(self._loss(batch))  # sync: the guard's own schedule
        return abs(ours - plain) / abs(plain) if math.isfinite(ours) else math.inf

    def _fall_back(self, names: list[str], reason: str) -> None:
        if names:
            scaling = self._state.fp8
            scaling.turn_off([*scaling.off, *names])
            # why: a compiled block with another choice is another graph.
            torch._dynamo.config.recompile_limit += len(names)
            step = self._state.step
            self._say(f"fp8, step {step}: {', '.join(names)} fall back to bf16: {reason}")

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


def blamed(errors: Mapping[str, float]) -> Iterator[list[str]]:
    """Who falls back, a list at a time until the caller is content.

    errors: of each product's output, relative. First all that stand out; then the worst of the
    rest, each time twice as many, until none is left.
    """
    worst = sorted(errors, key=lambda n: -errors[n] if errors[n] == errors[n] else -math.inf)
    known = sorted(error for error in errors.values() if math.isfinite(error))
    median = known[len(known) // 2] if known else 0.0
    limit = max(STANDS_OUT, TIMES * median)
    out = [name for name in worst if not errors[name] <= limit]
    if out:
        yield out
    rest, many = worst[len(out) :], 1
    while rest:
        yield rest[:many]
        rest, many = rest[many:], 2 * many
