"""What a run's wall time went to: RUN/timeline.jsonl, from all lives of its trainer.

Rank 0 appends, and nothing is ever cut back: after a roll-back or a resume step numbers go down,
and `pretrain.cluster.goodput` sees from that what was lost. A line holds the seconds since the line
before; what was not spent on a named thing was spent on steps.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from parallel.launch import Place

TIMELINE = "timeline.jsonl"


class Timeline:
    """The lines of one life. On ranks other than 0 every call does nothing."""

    def __init__(self, run_dir: Path, place: Place, step: int, spent: Mapping[str, float]) -> None:
        """Notes that the loop begins.

        step: the restored one. spent: seconds by what they went to, growing; `Meter.spent`.
        """
        self._path = run_dir / TIMELINE
        self._rank = place.rank
        self._spent = spent
        self._steps, self._first, self._asked = 0, True, False
        job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT")
        life = {"world": place.world, "job": job, "restart": int(restart or 0)}
        self._write("begin", step, life | {"started": process_start()})
        self._since = self._mark()

    def asked(self, step: int, asked: bool) -> bool:
        """Notes when rank 0 first sees a request to stop; gives the answer back."""
        if asked and not self._asked:
            self._asked = True
            self._write("asked", step, {})
        return asked

    def passed(self, step: int, *, line: bool, stop: bool = False) -> None:
        """A step was made, or all down to this one were undone. line: write; the first always is.

        Of a line that undoes, everything is lost, and no kind is told from another. stop: agreed
        on, which rank 0 hears of only now if another rank was asked.
        """
        self._steps += 1
        self.asked(step, stop)
        if self._first and self._rank == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()  # sync: once a life, so that its first step is done when told
        if line or self._first:
            self._write("steps", step, self._sums())
        self._first = False

    def end(self, step: int) -> None:
        """The last save is on the disk; whoever asked for it has been answered."""
        self._write("end", step, self._sums())

    def _sums(self) -> dict[str, Any]:
        """Since the line before; its seconds add up to the wall time."""
        (begin, before), self._since = self._since, self._mark()
        now, after = self._since
        named = {kind: after[kind] - before[kind] for kind in after}
        seconds = {"step": now - begin - sum(named.values())} | named
        steps, self._steps = self._steps, 0
        return {"steps": steps, "seconds": seconds}

    def _mark(self) -> tuple[float, dict[str, float]]:
        return time.perf_counter(), dict(self._spent)

    def _write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        if self._rank != 0:
            return
        line = json.dumps({"event": event, "time": time.time(), "step": step, **values})
        # why: what is noted here is not worth a run whose disk is full.
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def process_start() -> float:
    """When this process began, in seconds since the epoch; outside Linux, when it asks."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19])  # since the machine booted; field 22 of proc(5)
    except OSError:
        return time.time()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


@dataclass
class Life:
    """One process of the trainer, from the beginning of its loop, as its lines tell."""

    begin: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)  # those with seconds
    asked: dict[str, Any] | None = None
    ended: bool = False  # as it should, not by a crash

    @property
    def last(self) -> float:
        """Time of its last sign."""
        return self.lines[-1]["time"] if self.lines else self.begin["time"]


def read(run_dir: Path) -> list[Life]:
    """The lives of a run, oldest first; lines that a full disk or a kill cut short are left out."""
    lives: list[Life] = []
    for line in objects(run_dir / TIMELINE):
        event = line.get("event")
        if event == "begin":
            lives.append(Life(line))
        elif lives and event == "asked":
            lives[-1].asked = line
        elif lives and "seconds" in line:
            lives[-1].lines.append(line)
            lives[-1].ended = event == "end"
    return lives


def objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; other lines are left out, no file has none.

    Raises OSError.
    """
    found = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    found.append(value)
    return found
