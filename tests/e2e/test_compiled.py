"""Compiled blocks: all graphs are there before step 0, and no step makes another."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests import ranks, tiny

SLOW = pytest.mark.slow
SELECTIVE = {"remat__mode": "selective"}
IN_FP8 = {"fp8__keep_first": 0, "fp8__keep_last": 0}


def _counting(path: Path) -> None:
    """Trains on this rank; prints how many graphs there were after warm-up and at the end."""
    from torch._dynamo.utils import counters

    from parallel import remat
    from pretrain import config
    from pretrain import train as page
    from pretrain.engine import Engine

    # why: what is counted are dynamo's graphs; inductor would take minutes to make code of them
    assert remat.compile_units.__kwdefaults__ is not None
    remat.compile_units.__kwdefaults__["backend"] = "aot_eager"
    warm_up, found = Engine.warm_up, []

    def warmed(self: Engine, shape: tuple[int, ...]) -> None:
        warm_up(self, shape)
        found.append(counters["stats"]["unique_graphs"])

    Engine.warm_up = warmed  # type: ignore[method-assign]
    page.train(config.load(path, []))
    found.append(counters["stats"]["unique_graphs"])
    if os.environ["RANK"] == "0":
        print("graphs", json.dumps(found))


@pytest.mark.parametrize(
    ("world", "model", "changes"),
    [
        (1, "dit", {}),
        (1, "dit-moe", {}),
        (2, "dit-moe", {"mesh__ep": 2}),  # what its ranks exchange is of another size every step
        pytest.param(2, "dit-moe", {"mesh__ep": 2, "precision": "fp8"} | IN_FP8, marks=SLOW),
        pytest.param(4, "dit-moe", {"mesh__ep": 2, "mesh__tp": 2} | SELECTIVE, marks=SLOW),
    ],
)
def test_every_graph_is_made_before_step_0(
    tmp_path: Path, digits: Path, world: int, model: str, changes: dict[str, Any]
) -> None:
    common = {"steps": 6, "compile": True, "checkpoint__every": 100}
    path = tiny.write(tmp_path, model, digits, **common, **changes)
    ranks.run(_counting, world, path, log=tmp_path / "log")
    lines = (tmp_path / "log").read_text().splitlines()
    line = next(text for text in lines if text.startswith("graphs "))
    assert json.loads(line.removeprefix("graphs ")) == [1, 1]


def test_warming_up_changes_nothing(tmp_path: Path, digits: Path) -> None:
    """The first losses are those of a run whose blocks are not compiled."""
    path = tiny.write(tmp_path, "udit-moe", digits, steps=2, checkpoint__every=100)
    ranks.run(_warmed_or_not, 1, path, True, log=tmp_path / "log1")
    ranks.run(_warmed_or_not, 1, path, False, log=tmp_path / "log2")
    one, two = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("True", "False"))
    losses = [[json.loads(line)["loss"] for line in text.splitlines()] for text in (one, two)]
    assert losses[0] == losses[1]


def _warmed_or_not(path: Path, warm: bool) -> None:
    from pretrain import config
    from pretrain import train as page
    from pretrain.checkpoint import Checkpoint
    from pretrain.engine import Engine

    built: list[Engine] = []
    make, restore = Engine.__init__, Checkpoint.restore

    def kept(self: Engine, *args: object) -> None:
        make(self, *args)  # type: ignore[arg-type]
        built.append(self)

    def before(self: Checkpoint, *args: object) -> object:
        if warm:
            built[0].warm_up((16, 8, 8))
        return restore(self, *args)  # type: ignore[arg-type]

    Engine.__init__, Checkpoint.restore = kept, before  # type: ignore[method-assign]
    page.train(config.load(path, [f"run_dir={path.parent / str(warm)}"]))
