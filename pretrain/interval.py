"""How often a run saves: the interval that loses least to saves and to failures together.

A save holds up training for C seconds, a failure throws away half an interval T, and failures come
every M seconds: C/T + T/2M is lost, least at T = sqrt(2·C·M).

Source: Young 1974, "A first order approximation to the optimum checkpoint interval"; Daly 2006, "A
higher order estimate of the optimum checkpoint interval for restart dumps", whose further terms
matter where C is near M.
"""

import math
import statistics
import time
from collections import deque

from pretrain.manifest import CheckpointConfig, is_ephemeral

FIRST = 100  # steps between saves before anything is measured
TAKEN = 5  # newest saves whose median counts: a copy that met a busy machine is no measure
WORTH = 0.2  # relative change that is taken over: near its least the loss is flat


def best(blocked: float, written: float, step: float, mtbf: float) -> int:
    """Steps between saves. blocked: seconds that training waits for one; written: until it is on
    the disk; step: seconds of one step; mtbf: seconds between two failures of the job.

    At least twice `written`: a save that begins before the last one has ended waits for it.
    """
    return max(1, round(max(math.sqrt(2 * blocked * mtbf), 2 * written) / step))


class Interval:
    """Which steps are saved. All ranks call every method alike, but for `proposal`.

    What a rank measures moves nothing by itself: the ranks' clocks differ, and one of them would
    save alone. Rank 0 proposes, all hear of it with the save, and adopt it at the same step.
    """

    def __init__(self, cfg: CheckpointConfig, nodes: int) -> None:
        self._cfg = cfg
        self.automatic = cfg.every == "auto"
        self.steps = FIRST if cfg.every == "auto" else cfg.every
        self._mtbf = cfg.mtbf_hours * 3600 / nodes
        self._since = 0  # step last saved or restored
        self._measured_from: tuple[int, float] | None = None  # step, and the time it was made
        self._blocked: deque[float] = deque(maxlen=TAKEN)

    def due(self, step: int) -> bool:
        """Whether a step that was just made is saved."""
        cfg = self._cfg
        if not self.automatic:
            return step % self.steps == 0 or is_ephemeral(cfg, step)
        if self._measured_from is None:  # why: the first step of a life compiles and warms up
            self._measured_from = step, time.perf_counter()
        kept = cfg.keep_every is not None and step % cfg.keep_every == 0
        return kept or step >= self._since + self.steps

    def step_seconds(self, step: int) -> float | None:
        """Mean of the steps since the last save; None if none was timed."""
        if self._measured_from is None or self._measured_from[0] >= step:
            return None
        first, begin = self._measured_from
        return (time.perf_counter() - begin) / (step - first)

    def saved(self, step: int) -> None:
        """The copies of this step are made; the next interval begins."""
        self._since, self._measured_from = step, (step, time.perf_counter())

    def restored(self, step: int, steps: int | None) -> None:
        """The run goes on from here. steps: the interval that its checkpoint holds."""
        self._since, self._measured_from = step, None
        if self.automatic and steps is not None:
            self.steps = steps

    def proposal(self, blocked: float, written: float, step: float | None) -> int:
        """The interval that a save suggests, in steps; see `best`. step: None if not known."""
        if not self.automatic or step is None:
            return self.steps
        self._blocked.append(blocked)
        steps = best(statistics.median(self._blocked), written, step, self._mtbf)
        return steps if abs(steps - self.steps) > WORTH * self.steps else self.steps

    def adopt(self, steps: int) -> str | None:
        """Takes an interval that all ranks heard of; words if it is another one."""
        if steps == self.steps:
            return None
        before, self.steps = self.steps, steps
        return (
            f"saves are {steps} steps apart from here on, {before} before: checkpoint.every=auto, "
            f"one failure of these nodes in {self._mtbf / 3600:.4g} h (checkpoint.mtbf_hours)"
        )
