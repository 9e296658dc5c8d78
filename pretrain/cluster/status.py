"""How a run stands, from its directory and from Slurm: `pretrain status RUN…`.

Reads files and asks `squeue`; changes nothing. Slurm that does not answer is said, not raised.
"""

import fcntl
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from parallel.index import INDEX
from pretrain.cluster.blame import first_words
from pretrain.cluster.goodput import ATTEMPTS, Attempt, attempts, goodput
from pretrain.manifest import root, step_of, stored
from pretrain.metrics import METRICS
from pretrain.timeline import TIMELINE, objects

LIMIT = 10.0  # seconds that Slurm gets to answer
RECENT = 20  # logged intervals that the rate is taken from
FAILED = ("crashed", "unhealthy", "refused", "lost")
RUNNING = ("RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING", "PREEMPTED", "STOPPED")

Queue = dict[str, tuple[str, str]]  # job: state and reason, of those that Slurm still has in line


class StatusError(ValueError):
    """A place that holds no run."""


def of(run: Path) -> dict[str, Any]:
    """Everything about one run. Raises StatusError if `run` is no run directory."""
    return _all([run])[0]


def rows(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """A line a run, the lowest final loss first, unknown ones last. Raises StatusError."""
    found = sorted(_all(runs), key=lambda s: (s["final_loss"] is None, s["final_loss"] or 0.0))
    return [
        {
            "run": status["run"],
            "state": status["state"],
            "step": status["step"],
            "steps": status["steps"],
            "loss": status["final_loss"],
            "images_per_s": status["images_per_s"],
            "restarts": status["restarts"],
            "last_checkpoint": status["last_checkpoint"] and status["last_checkpoint"]["step"],
        }
        for status in found
    ]


def _all(runs: Sequence[Path]) -> list[dict[str, Any]]:
    tries = {run: _tries(run) for run in runs}
    jobs = {a.job for own in tries.values() for a in own[-1:] if a.job is not None}
    queue, problem = _queue(sorted(jobs)) if jobs else ({}, None)
    return [_status(run, tries[run], queue, problem) for run in runs]


def _tries(run: Path) -> list[Attempt]:
    names = ("config.yaml", ATTEMPTS, TIMELINE, METRICS, "latest", "done", root(run).name, "logs")
    if not any((run / name).exists() for name in names):
        raise StatusError(
            f"{run} {'holds no run' if run.is_dir() else 'is no directory'}; give a run directory, "
            "with config.yaml or attempts.jsonl in it"
        )
    return attempts(run)


def _status(run: Path, tries: list[Attempt], queue: Queue, problem: str | None) -> dict[str, Any]:
    """problem: why nothing is known of the queue."""
    now = time.time()
    state, why = _state(run, tries, queue, problem)
    records = objects(run / METRICS)
    saved = _last_checkpoint(run)
    rate = _rate(records)
    step, steps = _step(run, tries, records, saved), _steps(run)
    left = None
    if state == "running" and steps is not None and rate["steps_per_s"]:
        left = max(0, steps - step) / rate["steps_per_s"]
    goes_on = state == "running" and bool(tries) and not tries[-1].end and not tries[-1].ended_well
    newest = tries[-1] if tries else None
    stands = step if state == "unknown" else saved["step"] if saved else 0
    return {
        "run": str(run),
        "state": state,
        "why": why,
        "step": step,
        "steps": steps,
        **rate,
        "eta_s": left,
        "eta": None if left is None else _date(now + left),
        "restarts": max(0, len(tries) - 1),
        "job": newest and newest.job,
        "nodes": newest and newest.nodes,
        "slurm": problem,
        "last_checkpoint": saved,
        "last_error": _last_error(run, tries[:-1] if goes_on else tries),
        "final_loss": _final_loss(records),
        "goodput": goodput(tries, stands=stands, now=now if goes_on else None),
    }


def _state(
    run: Path, tries: list[Attempt], queue: Queue, problem: str | None
) -> tuple[str, str | None]:
    """One word, and the reason where somebody gave one.

    done, running, pending, stopped (saved and left on request), terminated (ended by Slurm or by
    scancel), crashed, lost (with its node), unhealthy, refused (wrong input), never started;
    unknown if only Slurm could say.
    """
    if (run / "done").is_file():
        return "done", None
    if _locked(run):
        return "running", None
    if not tries:
        return "never started", None
    newest = tries[-1]
    listed, reason = queue.get(newest.job or "", ("", ""))
    if listed and listed not in RUNNING:
        return "pending", reason
    if not newest.noted:
        return ("stopped" if newest.ended_well else "crashed"), None
    if newest.end is not None:
        return newest.outcome or "crashed", newest.why or None
    if listed:
        return "running", None
    if problem is not None:
        return "unknown", f"job {newest.job} has not noted its end, and of Slurm: {problem}"
    return "lost", f"job {newest.job} has not noted its end, and Slurm has it no more"


def _locked(run: Path) -> bool:
    """Whether a trainer holds the directory, as far as this machine can see."""
    try:
        with (run / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # none, or a file system without locks
        return False
    return False


def _queue(jobs: list[str]) -> tuple[Queue, str | None]:
    """What Slurm has in line of these jobs; or why that is not known."""
    if shutil.which("squeue") is None:
        return {}, "there is no squeue on this machine"
    command = ["squeue", "-h", "-j", ",".join(jobs), "-o", "%A|%T|%r"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        slow = isinstance(error, subprocess.TimeoutExpired)
        return {}, f"squeue did not answer in {LIMIT:.0f} s" if slow else f"squeue: {error}"
    if answer.returncode and "Invalid job id" not in answer.stderr:
        words = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
        return {}, f"squeue: {words[-1].removeprefix('squeue: ')}"
    lines = [line.split("|", 2) for line in answer.stdout.splitlines() if line.count("|") >= 2]
    return {job: (state, reason) for job, state, reason in lines}, None


def _last_checkpoint(run: Path) -> dict[str, Any] | None:
    whole = [folder for folder in stored(run) if (folder / INDEX).is_file()]
    if not whole:
        return None
    made = (whole[-1] / INDEX).stat().st_mtime
    return {"step": step_of(whole[-1]), "when": _date(made), "path": str(whole[-1])}


def _step(
    run: Path, tries: list[Attempt], records: list[dict[str, Any]], saved: dict[str, Any] | None
) -> int:
    """That the run was last known to be at."""
    lives = [life for attempt in tries for life in attempt.lives]
    if lives:
        return int((lives[-1].lines or [lives[-1].begin])[-1]["step"])
    known = [int(record["step"]) for record in records[-1:]] + [saved["step"] if saved else 0]
    return max(known)


def _steps(run: Path) -> int | None:
    """The run's length; None if it has not described itself yet."""
    path = run / "config.yaml"
    if not path.is_file():
        return None
    return OmegaConf.select(OmegaConf.load(path), "steps")


def _rate(records: list[dict[str, Any]]) -> dict[str, float | None]:
    """Median of the last logged intervals, so that a picture or a first step does not count."""
    recent = [r for r in records[-RECENT:] if r.get("step_time") and r.get("images_per_s")]
    if not recent:
        return {"images_per_s": None, "steps_per_s": None}
    return {
        "images_per_s": statistics.median(r["images_per_s"] for r in recent),
        "steps_per_s": 1 / statistics.median(r["step_time"] for r in recent),
    }


def _final_loss(records: list[dict[str, Any]]) -> float | None:
    """Mean of the last tenth of the logged steps; None if one of them is not finite."""
    last = [record.get("loss") for record in records[-math.ceil(len(records) / 10) :]]
    finite = [loss for loss in last if loss is not None and math.isfinite(loss)]
    return statistics.fmean(finite) if finite and len(finite) == len(last) else None


def _last_error(run: Path, tries: list[Attempt]) -> dict[str, Any] | None:
    """Of the newest attempt that failed: the words of its logs, or what its job noted."""
    for attempt in reversed(tries):
        vanished = attempt.outcome is None and not attempt.ended_well
        if attempt.outcome not in FAILED and not vanished:
            continue
        logs = sorted(p for p in (run / "logs").rglob("*") if _is_log(p, run, attempt))
        words = first_words(logs)
        if words is None and not attempt.why:
            return None
        text, log = words or (attempt.why, None)
        return {"attempt": attempt.name, "text": text, "log": log and str(log)}
    return None


def _is_log(path: Path, run: Path, attempt: Attempt) -> bool:
    """Of a rank, directly or in a folder of torchrun's."""
    inside = str(path.relative_to(run / "logs"))
    return path.suffix == ".log" and inside.startswith(f"{attempt.name}-") and path.is_file()


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="seconds")
