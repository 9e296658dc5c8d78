"""Runs a case: hurt, damaged, restarted by the same command, and held against what it should be."""

import json
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.encode import encode
from data_pipeline.order import Order
from data_pipeline.shards import Manifest
from pretrain import inspection
from tests import ranks, tiny
from tests.parity.table import Layout
from tests.torture import damage, hurts
from tests.torture.cases import DP2, EVERY, STEPS, Case
from tests.torture.hurts import Hurt
from tests.torture.server import DyingServer

BATCH = 12  # samples a step: shared out by 1, 2, 3 and 4 ranks
CLOSE = 1e-5  # largest relative difference of a loss on another layout
LIMIT = 120.0  # seconds of one start
DISK = "64m"  # of a file system of its own


@dataclass
class Outcome:
    """What came of a case; green if nothing is wrong."""

    moment: str = ""
    codes: list[list[int | None]] = field(default_factory=list)  # of every start
    lost: int | None = None  # steps done before the end that the restart had to do again
    equal: str = ""  # digests equal, or how far the losses are apart
    samples: str = ""
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)


@dataclass
class Bench:
    """Tiny runs of one model on one set of latents; references are made once each."""

    data: Path
    folder: Path
    seed: int = 0
    model: str = "udit-moe"
    _calm: dict[tuple[str, tuple[Hurt, ...]], Path] = field(default_factory=dict)

    def reference(self, layout: Layout, planted: tuple[Hurt, ...] = ()) -> Path:
        key = (layout.name, planted)
        if key not in self._calm:
            run = Path(tempfile.mkdtemp(prefix="calm-", dir=self.folder)) / "run"
            codes = self._start(run, self.data, layout, planted)
            assert codes == [0] * layout.ranks, _said(run)
            assert samples(run, self.data)[1] == "", samples(run, self.data)
            self._calm[key] = run
        return self._calm[key]

    def torture(self, case: Case) -> Outcome:
        place = Path(tempfile.mkdtemp(prefix="hurt-", dir=self.folder))
        began = time.monotonic()
        with _disk(place / "run") if case.disk else _folder(place / "run") as run:
            outcome = Outcome(", ".join(map(str, case.hurts)))
            try:
                torture = self._torture_by_server if case.server else self._torture
                torture(case, run, outcome)
            except AssertionError as error:  # ranks that hang, a reference that cannot be made
                outcome.wrong.append(str(error))
            if outcome.wrong:
                outcome.wrong.append(_said(run))
        outcome.seconds = time.monotonic() - began
        shutil.rmtree(place)
        return outcome

    def _torture(self, case: Case, run: Path, outcome: Outcome) -> None:
        rng, data = random.Random(f"{self.seed} {case}"), self.data
        if case.shard or any(hurt.act == "cut" for hurt in case.hurts):
            data = run.parent / "data"
            shutil.copytree(self.data, data)
        shard, filler = data / "train-000000.tar", run / "filler"
        aims = {"cut": shard, "fill": filler}
        first = tuple(replace(h, path=str(aims.get(h.act, ""))) for h in case.hurts)
        codes = self._start(run, data, case.start, first + case.planted)
        self._judge_end(case, run, codes, outcome)
        reached = _reached(run)
        if any(hurt.act == "cut" for hurt in case.hurts):
            outcome.expect(shard.name in _said(run), "the damaged shard was not named")
            shutil.copy2(self.data / shard.name, shard)
        filler.unlink(missing_ok=True)
        hurt_folder = None
        if case.checkpoint:
            hurt_folder = damage.newest(run)
            outcome.moment += f"; {damage.CHECKPOINT[case.checkpoint](hurt_folder, rng)}"
        if case.shard:
            self._without_shard(case, run, shard, rng, outcome)
        if case.again:
            outcome.moment += "; " + ", ".join(map(str, case.again))
            codes = self._start(run, data, case.then, case.again + case.planted)
            self._judge_end(case, run, codes, outcome)
        self._go_on(case, run, data, reached, hurt_folder, outcome)

    def _go_on(
        self,
        case: Case,
        run: Path,
        data: Path | str,
        reached: int,
        hurt_folder: Path | None,
        outcome: Outcome,
    ) -> None:
        """The restart that must end well. hurt_folder: a checkpoint that is damaged."""
        codes = self._start(run, data, case.then, case.planted)
        outcome.codes.append(codes)
        if codes != [0] * case.then.ranks:
            outcome.wrong.append(f"the restart ended with {codes}")
            return
        restored = _restored(run)
        outcome.lost = reached - restored
        if case.ends == "asked":
            outcome.expect(outcome.lost == 0, f"{outcome.lost} steps lost by a stop on request")
        if hurt_folder is not None and case.checkpoint in damage.NAMED:
            named = f"{hurt_folder.name}" in _said(run) and "skipped" in _said(run)
            outcome.expect(named, f"{hurt_folder.name} was not said to be skipped")
            outcome.expect(
                restored < _step_of(hurt_folder), f"restored {restored} from a damaged checkpoint"
            )
        self._compare(case, run, outcome)

    def _torture_by_server(self, case: Case, run: Path, outcome: Outcome) -> None:
        """Shards come from a server that dies on the way; then it is back."""
        left = random.Random(f"{self.seed} {case}").randint(300_000, 5_000_000)
        with DyingServer(self.shards, left) as server:
            codes = self._start(run, server.address, case.start, ())
            self._judge_end(case, run, codes, outcome)
            outcome.moment = f"after {left} bytes, in {', '.join(server.cut[:1])}"
            # why: each rank fetches what it needs first; whichever gives up first is named
            named = any(name in _said(run) for name in server.cut)
            outcome.expect(named, f"none of {server.cut} was named")
            server.left = None
            self._go_on(case, run, server.address, _reached(run), None, outcome)

    @cached_property
    def shards(self) -> Path:
        """The same samples in a dozen shards."""
        encode("digits", self.folder / "shards", codec="haar2", shard_size_mb=0.5)
        return self.folder / "shards"

    def _judge_end(self, case: Case, run: Path, codes: list[int | None], outcome: Outcome) -> None:
        outcome.codes.append(codes)
        hurt = case.server or (run.parent / "notes" / "hurt").exists()
        outcome.expect(hurt, "the run was never hurt")
        killed = [code is not None and code < 0 for code in codes]
        as_said = {
            "one killed": sum(killed) == 1 and all(code != 0 for code in codes),
            "all killed": all(killed),
            "asked": codes == [0] * len(codes),
            "failed": all(code in (1, 2) for code in codes),
        }[case.ends]
        outcome.expect(as_said, f"{case.ends} was wanted, exit codes {codes}")
        outcome.expect(not (run / "done").exists(), "the hurt run says it is done")
        outcome.expect(not (run / "stop").exists(), "the file stop is still there")

    def _without_shard(
        self, case: Case, run: Path, shard: Path, rng: random.Random, outcome: Outcome
    ) -> None:
        """A start while a shard is damaged: it must say so and end; then the shard is put back."""
        if case.shard == "shard deleted":
            shard.unlink()
            outcome.moment += f"; {shard.name} removed"
        else:
            outcome.moment += f"; {damage.truncate(shard, rng)}"
        before = len(_said(run))
        codes = self._start(run, shard.parent, case.then, ())
        outcome.codes.append(codes)
        outcome.expect(codes == [2] * len(codes), f"codes {codes} with a damaged shard")
        outcome.expect(shard.name in _said(run)[before:], "the damaged shard was not named")
        shutil.copy2(self.data / shard.name, shard)

    def _compare(self, case: Case, run: Path, outcome: Outcome) -> None:
        calm = self.reference(case.then if case.same else DP2, case.planted)
        ours, theirs = history(run), history(calm)
        outcome.expect([s for s, _ in ours] == list(range(1, STEPS + 1)), "steps are missing")
        outcome.expect((run / "done").exists(), "done is missing")
        if case.same:
            ends = [inspection.contents(place, digest=True) for place in (run, calm)]
            same = ends[0]["tensors"] == ends[1]["tensors"]
            outcome.equal = "digests equal" if same and ours == theirs else "DIFFERENT"
            outcome.expect(same, f"other digests: {_unequal(*(e['tensors'] for e in ends))}")
            outcome.expect(ours == theirs, "other losses")
            for what in ("step", "position", "skipped"):
                outcome.expect(ends[0][what] == ends[1][what], f"another {what}")
        else:
            apart = furthest(ours, theirs)
            outcome.equal = f"losses {apart:.0e}"
            outcome.expect(apart <= CLOSE, f"losses are {apart:.1e} apart")
        outcome.samples, problem = samples(run, self.data)
        outcome.expect(not problem, problem)

    def _start(
        self, run: Path, data: Path | str, layout: Layout, injuries: tuple[Hurt, ...]
    ) -> list[int | None]:
        """One start of the command; exit codes."""
        notes = run.parent / "notes"
        shutil.rmtree(notes, ignore_errors=True)
        notes.mkdir(parents=True)
        run.mkdir(exist_ok=True)
        words = (str(self._config(run, data)), *layout.words)
        started = ranks.start(
            hurts.train, layout.ranks, injuries, str(notes), str(run), *words, log=_log(run)
        )
        return ranks.wait(started, LIMIT)

    def _config(self, run: Path, data: Path | str) -> Path:
        return tiny.write(
            run.parent,
            self.model,
            self.data,
            data__path=str(data),
            data__cache=str(run.parent / "cache"),
            steps=STEPS,
            checkpoint__every=EVERY,
            data__global_batch=BATCH,
            model__zero_init_std=0.05,
            log__sample_ids=True,
        )


def history(run: Path) -> list[tuple[int, float | None]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def furthest(ours: list[tuple[int, float | None]], theirs: list[tuple[int, float | None]]) -> float:
    """Largest relative difference of a loss; infinite where one is a number and one is none."""
    apart = [0.0]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        if a is None or b is None:
            apart.append(0.0 if a is b else float("inf"))
        else:
            apart.append(abs(a - b) / abs(b))
    return max(apart)


def samples(run: Path, data: Path) -> tuple[str, str]:
    """How many samples the surviving history has seen, and what is wrong with them.

    Every slot of every step once, at the position that follows from the step, and the sample that
    the order has there.
    """
    count = Manifest.load(data).split("train").count
    order = Order(count, Manifest.load(data).lanes, 0, "samples")
    seen: Counter[int] = Counter()  # by position in the endless order
    for line in _seen(run):
        position, slots = line["position"], np.array(line["slots"])
        if position != (line["step"] - 1) * BATCH:
            return "", f"step {line['step']} was at position {position}"
        if order.samples(position + slots).tolist() != line["samples"]:
            return "", f"step {line['step']} saw other samples than the order has"
        seen.update((position + slots).tolist())
    lost = [place for place in range(STEPS * BATCH) if not seen[place]]
    twice = [place for place, times in seen.items() if times > 1]
    problem = f"{len(lost)} samples lost, {len(twice)} seen twice" if lost or twice else ""
    return f"{len(seen)} once", problem


def _seen(run: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((run / "seen").glob("rank_*.jsonl")):
        yield from map(json.loads, path.read_text().splitlines())


def _reached(run: Path) -> int:
    """The last step whose whole line is in metrics.jsonl."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def _restored(run: Path) -> int:
    note = run.parent / "notes" / "restored"
    return int(note.read_text()) if note.exists() else 0


def _step_of(folder: Path) -> int:
    return int(folder.name.split("_")[1])


def _log(run: Path) -> Path:
    return run.parent / "ranks.log"


def _said(run: Path) -> str:
    return _log(run).read_text() if _log(run).exists() else ""


def _unequal(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    return sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))[:4]


@contextmanager
def _folder(place: Path) -> Iterator[Path]:
    yield place


@contextmanager
def _disk(place: Path) -> Iterator[Path]:
    """A small file system of its own. Raises RuntimeError where this user may not mount one."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def may_mount(folder: Path) -> bool:
    """Whether this user may mount a small file system."""
    try:
        with _disk(Path(tempfile.mkdtemp(dir=folder)) / "disk"):
            return True
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False
