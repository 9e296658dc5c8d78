"""Rates of a run: images and FLOPs a second, what time went to, memory. Writes nothing."""

import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from parallel.clock import Clock
from pretrain.engine import Metrics
from pretrain.metrics import moe_load
from pretrain.state import TrainState

T = TypeVar("T")
# What a step's time is told by; "other" is what belongs to none.
KINDS = ("data", "forward", "backward", "communication", "optimizer", "checkpoint", "other")


class Meter:
    """Counts between records; `record` starts the next interval."""

    def __init__(self, global_batch: int, flops_per_image: int, peak: float, clock: Clock) -> None:
        """flops_per_image: of one training step, forward and backward. peak: FLOP/s of all ranks,
        which mfu is a share of. clock: of this process.
        """
        self._clock = clock
        self._global_batch = global_batch
        self._flops = flops_per_image
        self._peak = peak
        self._dropped = 0.0  # picks, up to the last record
        self.spent = {"data": 0.0, "save": 0.0, "other": 0.0}  # seconds since the start
        self._begin, self._steps = time.perf_counter(), 0
        self._waited = 0.0  # seconds for data, up to the last record

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """The seconds inside were spent on this: data, save or other."""
        begin = time.perf_counter()
        try:
            with self._clock.span("checkpoint" if kind == "save" else kind):
                yield
        finally:
            self.spent[kind] += time.perf_counter() - begin

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time each was waited for is counted."""
        source = iter(batches)
        while True:
            try:
                with self.spending("data"):
                    item = next(source)
            except StopIteration:
                return
            self._steps += 1
            yield item

    def record(self, state: TrainState, metrics: Metrics) -> dict[str, Any]:
        """What metrics.jsonl holds of a step; rates are means since the last record."""
        loss = float(metrics.loss)  # sync: the device has finished the step
        now = time.perf_counter()
        steps = max(1, self._steps)
        seconds = (now - self._begin) / steps
        images = self._global_batch / seconds
        values = {
            "loss": loss,
            "grad_norm": float(metrics.grad_norm),
            "lr": metrics.lr,
            "samples": state.cursor.position,
            "images_per_s": images,
            "tflops": images * self._flops / 1e12,
            "mfu": images * self._flops / self._peak,
            "data_wait": (self.spent["data"] - self._waited) / steps,
            "step_time": seconds,
            "memory_gb": _memory() / 1e9,
            "skipped": state.skipped,
        }
        parts = self._clock.read()
        values |= {f"time.{kind}": parts.get(kind, 0.0) / steps for kind in KINDS}
        values |= state.fp8.metrics()
        if metrics.load.numel():
            dropped = float(metrics.dropped)
            values |= moe_load(metrics.load) | {"moe.dropped": dropped - self._dropped}
            self._dropped = dropped
        self._begin, self._steps, self._waited = now, 0, self.spent["data"]
        return values


def _memory() -> float:
    """Peak bytes of this rank: of the device, or of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
