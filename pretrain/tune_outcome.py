"""What became of a trial of a search, read from its run directory; and what its score is."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from pretrain.cluster.blame import TRACEBACK, first_words
from pretrain.metrics import METRICS
from pretrain.timeline import objects

LAST = 5  # a fifth of the steps makes the score
SCORE = (
    "mean training loss of the last fifth of the steps; trials of one seed see the same samples "
)
SCORE += "under the same noise"
GAVE_UP = re.compile(r"NoWayBackError: (.*)")


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    state: Literal["done", "diverged", "failed", "unfinished"]
    reason: str | None = None
    loss: float | None = None  # the score; null unless done
    first_loss: float | None = None  # of step 1
    steps: int = 0  # that were made
    seconds: float = 0.0  # that these took

    @property
    def is_result(self) -> bool:
        return self.state in ("done", "diverged")


def outcome_of(folder: Path, steps: int) -> Outcome:
    """What a run directory says of a trial of so many steps."""
    records = objects(folder / METRICS)
    losses = {int(record["step"]): record.get("loss") for record in records}
    seconds = sum(record.get("step_time") or 0.0 for record in records)
    made = max(losses, default=0)
    found = Outcome("unfinished", None, None, losses.get(1), made, seconds)
    done = folder / "done"
    if not (done.is_file() and done.read_text().strip() == str(steps)):
        why = _gave_up(folder, losses.get(made, 0.0))
        return replace(found, state="diverged", reason=why) if why else found
    last = {step: loss for step, loss in losses.items() if step > steps - steps // LAST}
    bad = [step for step, loss in last.items() if loss is None]
    if found.first_loss is None or bad:
        where = bad[0] if bad else 1
        return replace(found, state="diverged", reason=f"the loss of step {where} is not finite")
    score = fmean(loss for loss in last.values() if loss is not None)
    if score > found.first_loss:
        why = f"the loss at the end, {score:.4g}, is above {found.first_loss:.4g}, that of step 1"
        return replace(found, state="diverged", reason=why)
    return replace(found, state="done", loss=score)


def _gave_up(folder: Path, last_loss: float | None) -> str | None:
    """Why a run that has not reached its end never will: the guard found no way back, or the
    program failed over numbers that are not finite. None: it may go on."""
    for log in sorted((folder / "logs").rglob("*.log")):
        text = log.read_text(errors="replace")
        if match := GAVE_UP.search(text):
            return match[1]
        if last_loss is None and TRACEBACK in text:
            words = first_words([log])
            return f"the loss is not finite, then {words[0] if words else 'a failure'}"
    return None
