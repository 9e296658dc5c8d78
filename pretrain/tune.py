"""`pretrain tune`: a search on proxies, each trial an ordinary run in a process of its own.

What was done is read from the run directories, so the same command goes on where it was ended.
Noise, timesteps and the order of data are functions of (seed, step, slot): trials of one seed see
the same samples under the same noise, and their losses can be compared after few steps. Not here:
ranges and verdicts (`tune_search`), and what is shown and written of them (`tune_report`).
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch

from parallel import launch
from pretrain import config, preflight
from pretrain.cluster.blame import first_words
from pretrain.models.mup import at_width
from pretrain.run import check_place
from pretrain.tune_outcome import LAST, Outcome, outcome_of
from pretrain.tune_search import (
    Point,
    Space,
    TuneError,
    check_keys,
    drawn,
    grid,
    loss_of,
    name,
    ranked,
)

# What a trial has otherwise than its configuration: every loss is logged, and no more is kept than
# a resume needs.
LEAN = ("log.every=1", "sample.every=0", "checkpoint.keep=1", "checkpoint.keep_every=null")
# What may differ between two calls of one trial.
FREE = ("run_dir", "threads", "timeout", "log", "sample", "checkpoint", "tuning")
POLL = 0.05  # seconds


class Process(Protocol):
    """A trial that was started."""

    def poll(self) -> int | None: ...
    def send_signal(self, sig: int, /) -> None: ...


# Words of the command line, environment, file for the output.
Begin = Callable[[Sequence[str], Mapping[str, str], Path], Process]


def begin(words: Sequence[str], env: Mapping[str, str], log: Path) -> Process:
    """`pretrain` with these words as a process; it ends with this one."""
    with log.open("wb") as file:
        # why: a session of its own keeps a terminal's ^C from reaching a trial twice.
        return subprocess.Popen(
            [sys.executable, "-m", "pretrain", *words],
            env=dict(env),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@dataclass(frozen=True)
class Search:
    """What was asked for."""

    path: Path
    overrides: tuple[str, ...]
    spaces: tuple[Space, ...]
    widths: tuple[int, ...]
    out: Path
    seeds: int = 1
    best: int = 3  # points of a width that get the further seeds
    random: int | None = None  # draws; null: the grid
    seed: int = 0  # of the draws
    budget: int | None = None  # trials in all


@dataclass(frozen=True)
class Trial:
    name: str
    width: int
    point: Point
    seed: int
    words: tuple[str, ...]  # key=value, beside the search's own overrides
    cfg: config.Config

    @property
    def folder(self) -> Path:
        return Path(self.cfg.run_dir)

    @property
    def log(self) -> Path:
        """What it said when it was started from here; Slurm's logs lie beside it."""
        return self.folder / "logs" / "tune.log"


class Sweep:
    """The trials of a search, and what is known of them."""

    def __init__(self, search: Search) -> None:
        """Raises TuneError, ConfigError, RunError or MupError for a search that cannot be made, or
        for a trial that was begun with other settings."""
        self.search = search
        self.base = config.load(search.path, list(search.overrides))
        check_place(search.out)
        for word in search.overrides:
            if word.partition("=")[0] in {own.partition("=")[0] for own in (*LEAN, "run_dir=")}:
                raise TuneError(
                    f"{word}: tune sets that by itself ({', '.join(LEAN)}, run_dir=OUT/TRIAL); "
                    "leave it out, or give --out"
                )
        check_keys(search.spaces, search.overrides, self.base.parametrisation)
        points = _points(search)
        self.beyond_budget = 0  # trials of the first seed
        self._room = len(points) * len(search.widths) * search.seeds
        if search.budget is not None:
            self._room = search.budget
            affordable = search.budget // len(search.widths)
            self.beyond_budget = max(0, len(points) - affordable) * len(search.widths)
            points = points[:affordable]
            if not points:
                raise TuneError(
                    f"--budget {search.budget} does not pay for one point at {len(search.widths)} "
                    f"widths; give at least {len(search.widths)}"
                )
        self._known: dict[tuple[int, Point, int], Trial] = {}
        self._results: dict[str, Outcome] = {}
        self._failed: dict[str, str] = {}  # why, by name
        firsts = [(width, point, 0) for point in points for width in search.widths]
        self.firsts = self._made(firsts)  # trials of the first seed

    def trials(self) -> list[Trial]:
        """All that are wanted, as far as that is known: those of the first seed and, when these
        have ended, the further seeds of the best points of each width."""
        search, further = self.search, list[tuple[int, Point, int]]()
        if self.whole():
            best = {width: ranked(own)[: search.best] for width, own in self._scores().items()}
            # The order is that of a budget: all widths have a second seed before one has a third.
            for index, rank in product(range(1, search.seeds), range(search.best)):
                further += [(w, own[rank], index) for w, own in best.items() if rank < len(own)]
        return self.firsts + self._made(further[: self._room - len(self.firsts)])

    def whole(self) -> bool:
        """Whether every trial of the first seed has a result."""
        return all(self.outcome(trial).is_result for trial in self.firsts)

    def _scores(self) -> dict[int, dict[Point, list[float]]]:
        """Those of the first seed, by width and point."""
        found: dict[int, dict[Point, list[float]]] = {width: {} for width in self.search.widths}
        for trial in self.firsts:
            found[trial.width][trial.point] = [loss_of(self.outcome(trial).loss)]
        return found

    def outcome(self, trial: Trial) -> Outcome:
        if trial.name in self._results:
            return self._results[trial.name]
        found = outcome_of(trial.folder, trial.cfg.steps)
        if found.is_result:
            self._results[trial.name] = found
        elif trial.name in self._failed:
            return replace(found, state="failed", reason=self._failed[trial.name])
        return found

    def beside(self) -> list[str]:
        """Trials in the same place that this search has no part in."""
        ours = {trial.name for trial in self.trials()}
        there = sorted(path.parent.name for path in self.search.out.glob("*/config.yaml"))
        return [one for one in there if one not in ours]

    def pending(self) -> list[Trial]:
        """Trials without a result that have not failed in this life of the sweep."""
        return [
            trial
            for trial in self.trials()
            if trial.name not in self._failed and not self.outcome(trial).is_result
        ]

    def losses(self) -> dict[int, dict[Point, list[float]]]:
        """Scores by width, point and seed; inf: diverged."""
        found: dict[int, dict[Point, list[float]]] = {width: {} for width in self.search.widths}
        for trial in self.trials():
            outcome = self.outcome(trial)
            if outcome.is_result:
                found[trial.width].setdefault(trial.point, []).append(loss_of(outcome.loss))
        return found

    def run(self, jobs: int, say: Callable[[Trial], None], start: Begin = begin) -> bool:
        """Trains what is pending, `jobs` trials side by side; whether it came to its end.

        False: it was asked to stop, by SIGTERM or SIGINT, which the trials were told: they save,
        and the next call goes on with them. say: hears of each trial that has ended. Raises what
        preflight raises, before the first trial.
        """
        checked: set[int] = set()
        while waiting := self.pending():
            for trial in waiting:
                if trial.width not in checked:
                    preflight.preflight(trial.cfg, 1)
                checked.add(trial.width)
            if not self._side_by_side(waiting, jobs, say, start):
                return False
        return True

    def _side_by_side(
        self, trials: Sequence[Trial], jobs: int, say: Callable[[Trial], None], start: Begin
    ) -> bool:
        waiting, running, asked = deque(trials), dict[int, tuple[Trial, Process]](), list[int]()

        def stop(number: int, _frame: object) -> None:
            asked.append(number)
            print("asked to stop: trials in work are saving", file=sys.stderr, flush=True)
            for _, process in running.values():
                process.send_signal(signal.SIGTERM)

        before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            with tempfile.TemporaryDirectory(prefix="pretrain-") as meeting:
                while running or (waiting and not asked):
                    for slot in range(jobs):
                        if slot not in running and waiting and not asked:
                            trial = waiting.popleft()
                            trial.log.parent.mkdir(parents=True, exist_ok=True)
                            env = _alone(slot, Path(meeting) / trial.name)
                            running[slot] = trial, start(self._words(trial, jobs), env, trial.log)
                            if asked:  # while it was started, when it could not be told
                                running[slot][1].send_signal(signal.SIGTERM)
                    for slot, (trial, process) in list(running.items()):
                        code = process.poll()
                        if code is not None:
                            del running[slot]
                            self._note(trial, code, stopping=bool(asked))
                            say(trial)
                    time.sleep(POLL)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for _, process in running.values():
                process.send_signal(signal.SIGKILL)
        return not asked

    def _words(self, trial: Trial, jobs: int) -> list[str]:
        words = ["train", str(self.search.path), *self.search.overrides, *trial.words]
        words.append(f"run_dir={trial.folder}")
        if trial.cfg.threads is None:
            words.append(f"threads={max(1, launch.default_threads(launch.Place.here()) // jobs)}")
        return words

    def _note(self, trial: Trial, code: int, *, stopping: bool) -> None:
        found = outcome_of(trial.folder, trial.cfg.steps)
        if found.is_result or stopping:
            return
        words = first_words([trial.log])
        if code < 0:
            why = f"was ended by {signal.Signals(-code).name}"
        elif code == 0:
            why = f"was asked to stop, at step {found.steps}"
        else:
            why = words[0].removeprefix("pretrain: ") if words else f"exit code {code}"
        self._failed[trial.name] = f"{why} ({trial.log})"

    def _made(self, wanted: Sequence[tuple[int, Point, int]]) -> list[Trial]:
        """Of width, point and index of the seed."""
        for one in wanted:
            if one not in self._known:
                self._known[one] = self._trial(*one)
        trials = [self._known[one] for one in wanted]
        for label, times in Counter(trial.name for trial in trials).items():
            if times > 1:
                raise TuneError(
                    f"two trials are called {label}: names hold six digits of a value; take values "
                    "that differ in these"
                )
        return trials

    def _trial(self, width: int, point: Point, index: int) -> Trial:
        search, seed = self.search, self.base.seed + index
        label = name(width, search.spaces, point, seed)
        model = at_width(self.base.model, width)
        words = [f"model.width={width}"]
        if model.num_heads is not None:
            words.append(f"model.num_heads={model.num_heads}")
        words += [f"{one.key}={v}" for one, v in zip(search.spaces, point, strict=True)]
        words += [f"seed={seed}", *LEAN]
        place = f"run_dir={search.out / label}"
        cfg = config.load(search.path, [*search.overrides, *words, place])
        assert cfg.model.heads() == model.heads(), f"{words} make {cfg.model.heads()}"
        if cfg.steps < LAST:
            raise TuneError(f"steps={cfg.steps}: a trial needs at least {LAST}; set steps")
        _refuse_another(cfg)
        return Trial(label, width, point, seed, tuple(words), cfg)


def _alone(slot: int, store: Path) -> dict[str, str]:
    """Environment of a trial that is a world of its own; trials side by side share out the GPUs."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    env = os.environ | place | {launch.STORE: str(store)}
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        env["CUDA_VISIBLE_DEVICES"] = seen.split(",")[slot % count]
    return env


def _points(search: Search) -> list[Point]:
    if search.random is None:
        return grid(search.spaces)
    return drawn(search.spaces, search.random, search.seed)


def _refuse_another(cfg: config.Config) -> None:
    """Raises TuneError if there is a run of other settings in this place."""
    begun = Path(cfg.run_dir) / "config.yaml"
    if not begun.is_file():
        return
    theirs, ours = (_flat(one.model_dump(mode="json")) for one in (config.load(begun, []), cfg))
    changed = [key for key in sorted(theirs | ours) if theirs.get(key) != ours.get(key)]
    if changed:
        key = changed[0]
        more = f" ({len(changed) - 1} more settings differ)" if len(changed) > 1 else ""
        raise TuneError(
            f"{begun.parent} was begun with {key}={theirs.get(key)}, not {ours.get(key)}{more}; "
            "restore that, or give another --out"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key, without what may differ."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if not prefix and key in FREE:
            continue
        inner = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found
