"""A trace of chosen steps, for chrome://tracing or Perfetto: RUN/profile/steps_10-12.json.gz.

Rank 0 alone writes: what it waits for others shows in its own trace.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator


class ProfileConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    first: PositiveInt | None = (
        None  # step that the trace begins with, as in metrics.jsonl; or none
    )
    last: PositiveInt | None = None  # step that it ends with; null: the first alone

    @model_validator(mode="after")
    def _in_order(self) -> "ProfileConfig":
        if self.last is not None and (self.first is None or self.last < self.first):
            raise ValueError(
                f"profile.first={self.first}, profile.last={self.last}: a trace ends at or after "
                "the step it begins with; give both, in order"
            )
        return self


class Profile:
    """The trace of one life of a run; on ranks other than 0, or if none is asked, nothing."""

    def __init__(self, cfg: ProfileConfig, folder: Path, rank: int) -> None:
        self._first, self._last = cfg.first, cfg.last or cfg.first
        self._folder = folder / "profile"
        self._wanted = rank == 0 and self._first is not None
        self._running: Any = None
        self._from = 0

    def reach(self, step: int) -> Path | None:
        """So many steps are done. Begins before the first of the trace, ends after the last.

        Returns the file when it was written.
        """
        if not self._wanted:
            return None
        assert self._first is not None
        assert self._last is not None
        if self._running is None and self._first <= step + 1 <= self._last:
            self._from = step + 1
            self._running = torch.profiler.profile(record_shapes=True, with_stack=False)
            self._running.start()
        elif self._running is not None and step >= self._last:
            return self.close(step)
        return None

    def close(self, step: int) -> Path | None:
        """Ends a trace under way, which then is shorter than was asked."""
        if self._running is None:
            return None
        self._running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps_{self._from}-{step}.json.gz"
        self._running.export_chrome_trace(str(path))
        self._running, self._wanted = None, False
        return path
