"""What was predicted of a run beside what it measures, in one line of its log.

seen = compare.Resident(device)                      # before anything is assembled
prediction = planned.prediction(cfg, world, device)
run.say(prediction.line(seen.peak(), step_seconds))  # once, after some steps
"""

import resource
from dataclasses import dataclass

import torch

from pretrain.planning.hours import Hours
from pretrain.planning.memory import PerRank


@dataclass(frozen=True)
class Prediction:
    """Made at the start of a run."""

    memory: int  # bytes of tensors on rank 0 at the fullest moment, without an allowance
    step_seconds: float | None  # None: not predicted
    basis: str  # of the seconds, or why there are none

    def line(self, measured_memory: float, measured_step_seconds: float) -> str:
        """measured_memory: bytes; errors are predicted ÷ measured − 1."""
        memory = _beside(self.memory / 1e9, measured_memory / 1e9, "GB")
        if self.step_seconds is None:
            step = f"a step took {measured_step_seconds:.4g} s; it was not predicted: {self.basis}"
        else:
            step = f"step {_beside(self.step_seconds, measured_step_seconds, 's')}; {self.basis}"
        return f"plan: memory {memory}; {step}"


def prediction(held: PerRank, took: Hours) -> Prediction:
    return Prediction(held.total - held.fragments, took.step_seconds, took.hours_basis)


def _beside(predicted: float, measured: float, unit: str) -> str:
    if measured <= 0:
        return f"{predicted:.4g} {unit} predicted, none measured"
    error = 100 * (predicted / measured - 1)
    return f"{predicted:.4g} {unit} predicted, {measured:.4g} measured ({error:+.0f} %)"


class Resident:
    """Peak bytes of tensors of this rank.

    On a GPU what its allocator gave out; on a CPU what the process has grown by since this was
    made, which the allocator may hold on to and libraries loaded later add to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0 if device.type == "cuda" else _resident()

    def peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(0, most - self._before)


def _resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
