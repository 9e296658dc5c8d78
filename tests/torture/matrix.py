"""Saved at one layout, loaded at another: digests before and after, experts one by one, losses.

    python -m tests.torture.matrix [--models dit-moe,…]

Every layout trains a few steps and saves. Then every layout starts once, loads what each of the
others has saved, writes what it holds to another place, and trains on.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from data_pipeline.encode import encode
from parallel import storage
from pretrain import inspection, manifest
from tests import ranks, tiny
from tests.parity.table import BY_NAME, Layout
from tests.torture.cases import ALONE, DP3

SAVED, MORE = 3, 5  # steps before the save, and after the load
BATCH = 12
CLOSE = 1e-5  # largest relative difference of a loss from the run that never stopped
LIMIT = 240.0  # seconds of one start

# Among these every ordered pair; `ring`: each once as source and once as target.
SIX = {
    "dit": ("1", "dp2", "tp2", "HSDP 2×2", "ZeRO-3", "ZeRO-1×tp2"),
    "dit-moe": ("1", "ep2", "ep2×tp2", "HSDP 2×2", "ZeRO-2×ep2", "ZeRO-1×tp2"),
    "udit-moe": (),
}
RING = {
    "dit": (),
    "dit-moe": ("dp3", "ep4", "ZeRO-3", "dp2×ep2×tp2", "ZeRO-2", "tp2", "ep2 static"),
    "udit-moe": ("1", "ZeRO-2×ep2", "ep2×tp2", "ep2", "HSDP 2×2", "ZeRO-3", "dp3", "ZeRO-1×tp2"),
}
KINDS = ("model", "ema", "ema_h4", "ema_p0.1", "optim.exp_avg", "optim.exp_avg_sq", "guard")
Pair = tuple[str, str]


def layout(name: str) -> Layout:
    return {"1": ALONE, "dp3": DP3}.get(name) or BY_NAME[name]


def pairs(model: str) -> list[Pair]:
    ring = RING[model]
    return [*itertools.permutations(SIX[model], 2), *zip(ring, ring[1:] + ring[:1], strict=True)]


@dataclass
class Cell:
    """What came of one pair; green if nothing is wrong."""

    loss: float = 0.0  # largest relative difference
    tensors: int = 0  # whose digests are equal
    experts: int = 0  # rows of experts that are the same and in their place
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{'RED' if self.wrong else '='} {self.loss:.0e}"


@dataclass
class Matrix:
    """Tiny runs of one model."""

    data: Path
    folder: Path
    model: str

    def __post_init__(self) -> None:
        self._sources: dict[str, Path] = {}
        self.calm = self._train(ALONE, self.folder / "calm", SAVED + MORE)
        self._losses = _losses(self.calm)[0]

    def cells(self, chosen: list[Pair]) -> dict[Pair, Cell]:
        for name in dict.fromkeys(source for source, _ in chosen):
            self._sources[name] = self._train(layout(name), self.folder / f"from-{name}", SAVED)
        found: dict[Pair, Cell] = {}
        for target in dict.fromkeys(target for _, target in chosen):
            found |= self._visit(target, [source for source, to in chosen if to == target])
        return found

    def _visit(self, target: str, sources: list[str]) -> dict[Pair, Cell]:
        """One start of a layout, which loads from all sources in turn."""
        place, at = self.folder / f"to-{target}", layout(target)
        runs = tuple(str(self._sources[name]) for name in sources)
        # why: one step more than the last source needs, so that the trainer asks for the next one
        steps = SAVED + MORE + 1
        words = (*self._words(at, place), f"steps={steps}")
        self._start(visit, at, place, runs, str(place / "copies"), *words)
        losses = _losses(place)
        return {
            (name, target): self._judge(self._sources[name], place / "copies" / str(number), mine)
            for number, (name, mine) in enumerate(zip(sources, losses, strict=True))
        }

    def _judge(self, before: Path, after: Path, losses: dict[int, float]) -> Cell:
        cell = Cell()
        one, other = (inspection.contents(run, digest=True) for run in (before, after))
        cell.tensors = len(one["tensors"])
        for kind in KINDS:
            if not any(name.startswith(f"{kind}.") for name in one["tensors"]):
                cell.wrong.append(f"nothing of {kind} was saved")
        if one["tensors"] != other["tensors"]:
            cell.wrong.append("other digests")
        if (one["step"], one["position"]) != (other["step"], other["position"]):
            cell.wrong.append("another step or position")
        cell.experts = self.experts(before, after, cell.wrong)
        wanted = {step: self._losses[step] for step in range(SAVED + 1, SAVED + MORE + 1)}
        apart = [abs(losses[step] - loss) / abs(loss) for step, loss in wanted.items()]
        cell.loss = max(apart)
        if cell.loss > CLOSE:
            cell.wrong.append(f"losses are {cell.loss:.1e} apart")
        return cell

    def experts(self, before: Path, after: Path, wrong: list[str]) -> int:
        """Rows of [E, …] tensors that are equal, unlike each other, and where one process has them.

        Compared with the one-process run at the same step by distance: rows differ by rounding, and
        from other experts' rows by far more.
        """
        one, other = (manifest.locate(run) for run in (before, after))
        names = [name for name in storage.contents(one) if ".experts." in name]
        ours, theirs = storage.read_alone(names, one), storage.read_alone(names, other)
        alone = storage.read_alone(names, self.calm / "checkpoints" / f"step_{SAVED:08d}")
        rows = 0
        for name in names:
            if [*map(inspection.digest_of, ours[name])] != [
                *map(inspection.digest_of, theirs[name])
            ]:
                wrong.append(f"{name}: other experts")
            if name.startswith("optim."):  # why: second moments of two experts may be alike
                continue
            apart = torch.cdist(theirs[name].flatten(1).double(), alone[name].flatten(1).double())
            near = apart.diagonal()
            far = (apart + torch.diag(torch.full_like(near, torch.inf))).amin(1)
            if not bool((near * 100 < far).all()):
                wrong.append(f"{name}: an expert is in another's place")
            rows += len(near)
        return rows

    def _train(self, at: Layout, run: Path, steps: int) -> Path:
        every = f"checkpoint.every={SAVED}"
        words = ("train", *self._words(at, run), f"steps={steps}", every)
        self._start(ranks.pretrain, at, run, *words)
        return run

    def _start(self, target: Any, at: Layout, run: Path, *words: Any) -> None:
        run.mkdir(parents=True, exist_ok=True)
        log = run / "ranks.log"
        codes = ranks.wait(ranks.start(target, at.ranks, *words, log=log), LIMIT)
        assert codes == [0] * at.ranks, f"{self.model} on {at.name}: {codes}\n{log.read_text()}"

    def _words(self, at: Layout, run: Path) -> tuple[str, ...]:
        config = tiny.write(
            run,
            self.model,
            self.data,
            data__global_batch=BATCH,
            model__zero_init_std=0.05,
            checkpoint__every=1000,
            ema__half_lives=[4],
            ema__power=[0.1],
        )
        return (str(config), f"run_dir={run}", *at.words)


def visit(sources: tuple[str, ...], out: str, *words: str) -> None:
    """Trains in a rank; instead of starting anew it loads each source, copies it, and goes on."""
    from data_pipeline.cursor import Cursor
    from data_pipeline.loader import Loader
    from pretrain.checkpoint import Checkpoint
    from pretrain.state import TrainState

    new, begin, start = TrainState.new, Checkpoint.__init__, Loader.start
    states: list[TrainState] = []
    made: list[Any] = []

    def keep(*args: Any, **kwargs: Any) -> TrainState:
        states.append(new(*args, **kwargs))
        return states[-1]

    def remember(self: Checkpoint, *args: Any) -> None:
        made.append(args)
        begin(self, *args)

    def batches(self: Loader, _cursor: Cursor) -> Iterator[Any]:
        state, (cfg, _, *rest) = states[0], made[0]
        for number, source in enumerate(sources):
            assert Checkpoint(cfg, Path(source), *rest).restore(state), source
            copy = Checkpoint(cfg, Path(out) / str(number), *rest)
            copy.save(state)
            copy.wait()
            yield from itertools.islice(start(self, state.cursor), MORE)
        yield from start(self, state.cursor)

    TrainState.new = staticmethod(keep)  # type: ignore[method-assign]
    Checkpoint.__init__ = remember  # type: ignore[method-assign]
    Loader.start = batches  # type: ignore[method-assign]
    ranks.pretrain("train", *words)


def _losses(run: Path) -> list[dict[int, float]]:
    """Losses by step, of each stretch of rising steps in metrics.jsonl."""
    found: list[dict[int, float]] = []
    last = None
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if last is None or line["step"] <= last:
            found.append({})
        last = line["step"]
        found[-1][last] = line["loss"]
    return found


def main(words: list[str] | None = None) -> int:
    """Prints a table a model; returns how many pairs are red."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(SIX))
    models = parser.parse_args(words).models.split(",")
    console, red, began, count = Console(width=170), 0, time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="matrix-") as name:
        data = Path(name) / "digits"
        encode("digits", data, codec="haar2")
        for model in models:
            cells = Matrix(data, Path(name) / model, model).cells(pairs(model))
            count += len(cells)
            targets = list(dict.fromkeys((*SIX[model], *RING[model])))
            table = Table("saved at, loaded at →", *targets, title=_title(model, cells))
            for source in targets:
                row = [str(cells.get((source, target), "")) for target in targets]
                table.add_row(source, *row)
            console.print(table)
            for (source, target), cell in cells.items():
                if cell.wrong:
                    red += 1
                    print(f"RED: {model}, {source} → {target}: {'; '.join(cell.wrong[:6])}")
    console.print(f"{count} pairs, {red} red, {time.monotonic() - began:.0f} s")
    return red


def _title(model: str, cells: dict[Pair, Cell]) -> str:
    any_cell = next(iter(cells.values()))
    return (
        f"{model}: = for equal digests of {any_cell.tensors} tensors and {any_cell.experts} rows "
        f"of experts in their place; largest difference of {MORE} losses from one process"
    )


if __name__ == "__main__":
    sys.exit(int(main() > 0))
