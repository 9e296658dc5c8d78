"""What the time that a run was given went to, from RUN/attempts.jsonl and RUN/timeline.jsonl.

An attempt is one incarnation of a job, from its first line to its last; a life is one process of
the trainer inside it. Without a job a life is its own attempt. Reads files only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.timeline import Life, objects, read

ATTEMPTS = "attempts.jsonl"
SLACK = 1.0  # seconds by which two clocks of one machine may read otherwise


@dataclass
class Attempt:
    """One try of a run."""

    begin: float  # seconds since the epoch, as all times here
    job: str | None
    restart: int
    nodes: str | None
    gpus: int
    end: float | None = None  # None: nobody has said so
    outcome: str | None = None
    why: str = ""
    noted: bool = True  # in attempts.jsonl; else a life that somebody started by hand
    lives: list[Life] = field(default_factory=list)

    @property
    def last(self) -> float:
        """When it ended, or else the last sign of it."""
        return max([self.end or self.begin, *(life.last for life in self.lives)])

    @property
    def ended_well(self) -> bool:
        return bool(self.lives) and self.lives[-1].ended

    @property
    def name(self) -> str:
        return f"{self.job}.{self.restart}"


def attempts(run_dir: Path) -> list[Attempt]:
    """All tries of a run, oldest first, with the lives of each. Raises OSError."""
    found: list[Attempt] = []
    for line in objects(run_dir / ATTEMPTS):
        key = (str(line.get("job")), int(line.get("restart", 0)))
        if line.get("event") == "begin":
            gpus = line.get("gpus") or line.get("ranks") or 1
            found.append(Attempt(line["time"], *key, line.get("nodes"), int(gpus)))
        elif line.get("event") == "end":
            own = [a for a in found if (a.job, a.restart) == key and a.end is None]
            if own:
                own[-1].end, own[-1].outcome = line["time"], line.get("outcome")
                own[-1].why = str(line.get("why", ""))
    for life in read(run_dir):
        _attempt_of(life, found).lives.append(life)
    return sorted(found, key=lambda attempt: attempt.begin)


def _attempt_of(life: Life, known: list[Attempt]) -> Attempt:
    """The one that started this life; a new one if nobody has noted it."""
    begin = life.begin
    for attempt in reversed(known):
        same = (attempt.job, attempt.restart) == (begin["job"], begin["restart"])
        if attempt.noted and same and attempt.begin <= begin["started"] + SLACK:
            return attempt
    job, restart, world = begin["job"], begin["restart"], begin["world"]
    known.append(Attempt(begin["started"], job, restart, None, world, noted=False))
    return known[-1]


@dataclass
class _Account:
    """Sums over a history; `standing` are the steps that the run still stands on."""

    sums: dict[str, float]
    standing: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)

    def take(self, line: dict[str, Any], at: int) -> int:
        """One line with seconds, of a life that stood at this step; where it stands then."""
        seconds, step = line["seconds"], line["step"]
        if step < at + line["steps"]:  # a roll-back: these steps too are thrown away
            self.go_back(step)
            self.sums["lost"] += sum(seconds.values())
        else:
            self.standing.append((at, step, seconds))
        return step

    def go_back(self, step: int) -> None:
        """What was made after this step is lost, of a line that goes beyond it the share."""
        kept = []
        for first, last, seconds in self.standing:
            share = 1.0 if last <= step else max(0, step - first) / (last - first)
            self.sums["lost"] += (1 - share) * sum(seconds.values())
            if share:
                part = {kind: share * value for kind, value in seconds.items()}
                kept.append((first, min(last, step), part))
        self.standing = kept


def goodput(tries: Sequence[Attempt], *, stands: int, now: float | None) -> dict[str, Any]:
    """Seconds allocated to a run and what they went to, which adds up; goodput = useful/allocated.

    stands: step of the last checkpoint, on which a run that has crashed stands. now: the time, of
    a run whose last attempt goes on; what that has not written about yet is `unaccounted_s`.
    """
    names = ("useful", "start", "data", "save", "lost", "restart", "other", "unaccounted")
    account = _Account(dict.fromkeys(names, 0.0))
    sums, allocated, gpu_seconds = account.sums, 0.0, 0.0
    for number, attempt in enumerate(tries):
        goes_on = now is not None and attempt is tries[-1]
        end = max(attempt.last, now or 0.0) if goes_on else attempt.last
        allocated += end - attempt.begin
        gpu_seconds += (end - attempt.begin) * attempt.gpus
        place, waits = attempt.begin, "restart" if number else "start"
        for life in attempt.lives:
            sums[waits] += life.begin["time"] - place
            waits, place, at = "restart", life.last, life.begin["step"]
            account.go_back(at)
            spent = life.last - life.begin["time"]
            for line in life.lines:
                at = account.take(line, at)
                spent -= sum(line["seconds"].values())
            sums["unaccounted"] += spent
        if goes_on and attempt.lives:
            waits = "unaccounted"
        elif attempt.ended_well:
            waits = "other"
        sums[waits] += end - place
    if tries and now is None and not tries[-1].ended_well:
        account.go_back(stands)
    for _, _, seconds in account.standing:
        for kind, value in seconds.items():
            sums[{"step": "useful"}.get(kind, kind)] += value
    rounded = {f"{name}_s": round(value, 3) for name, value in sums.items()}
    return {
        "allocated_s": round(sum(rounded.values()), 3),
        **rounded,
        "goodput": sums["useful"] / allocated if allocated else None,
        "attempts": len(tries),
        "gpu_hours": gpu_seconds / 3600,
    }
