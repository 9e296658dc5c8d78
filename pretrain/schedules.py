"""Learning-rate schedules: pure functions of the step, giving a factor of the peak.

Nothing to save, nothing to advance: after a resume the same step gives the same factor.

    lr = cfg.optim.lr * schedule(state.step, cfg.steps)
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Constant(BaseModel):
    """Linear warm-up, then the peak for ever."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
    kind: Literal["constant"] = "constant"
    warmup: int = Field(0, ge=0)  # steps

    def __call__(self, step: int, steps: int) -> float:
        """step: updates already made, from 0. steps: length of the run, unused here."""
        return _warm(step, self.warmup)


class Cosine(BaseModel):
    """Linear warm-up, then half a cosine down to `final` of the peak. Source: SGDR, Eq. 5."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(0, ge=0)  # steps
    steps: int | None = Field(None, ge=1)  # steps from start to `final`; None: the run's
    final: float = Field(0.0, ge=0.0, le=1.0)  # factor at the end and after it

    @model_validator(mode="after")
    def _warmup_fits(self) -> "Cosine":
        _fits(self.steps, warmup=self.warmup)
        return self

    def __call__(self, step: int, steps: int) -> float:
        """step: updates already made, from 0. steps: length of the run."""
        if step < self.warmup:
            return _warm(step, self.warmup)
        span = (self.steps or steps) - self.warmup
        done = min(1.0, (step - self.warmup) / span) if span > 0 else 1.0
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * done))


class WSD(BaseModel):
    """Linear warm-up, the peak, then a straight or 1-sqrt cool-down to `final` of the peak.

    Source: MiniCPM, Sec. 4 (warm-up, stable, decay); Haegele et al. 2024 (1-sqrt).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
    kind: Literal["wsd"] = "wsd"
    warmup: int = Field(0, ge=0)  # steps
    cooldown: int = Field(ge=1)  # steps, the last ones
    shape: Literal["linear", "sqrt"] = "linear"  # of the cool-down
    steps: int | None = Field(None, ge=1)  # steps from start to `final`; None: the run's
    final: float = Field(0.0, ge=0.0, le=1.0)  # factor at the end and after it

    @model_validator(mode="after")
    def _parts_fit(self) -> "WSD":
        _fits(self.steps, warmup=self.warmup, cooldown=self.cooldown)
        return self

    def __call__(self, step: int, steps: int) -> float:
        """step: updates already made, from 0. steps: length of the run.

        Where warm-up and cool-down overlap in a short run, the lower of the two holds.
        """
        left = (self.steps or steps) - step
        done = min(1.0, max(0.0, 1.0 - left / self.cooldown))
        fall = done if self.shape == "linear" else math.sqrt(done)
        return min(_warm(step, self.warmup), 1.0 - (1.0 - self.final) * fall)


ScheduleConfig = Annotated[Constant | Cosine | WSD, Field(discriminator="kind")]


def every(n: int, step: int) -> bool:
    """Whether something done every n steps is due after `step` of them; n = 0 is never."""
    return n > 0 and step > 0 and step % n == 0


def _warm(step: int, warmup: int) -> float:
    # why: step + 1. The first update moves, and the last warm-up update has the peak.
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _fits(steps: int | None, **parts: int) -> None:
    if steps is not None and sum(parts.values()) > steps:
        came = " + ".join(f"{name}={value}" for name, value in parts.items())
        raise ValueError(f"{came} do not fit into steps={steps}; shorten them or raise steps")
