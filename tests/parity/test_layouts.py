"""The loss does not know the layout: ranks and accumulation in any product give the same numbers.

Zero-initialised tensors are perturbed first: adaLN-Zero hides faults (an expert doubled changes ten
losses of a fresh model by 3e-6).
"""

import json
from pathlib import Path

import pytest

from pretrain.models import moe
from tests import ranks, tiny

TOLERANCE = 2e-6  # relative, on every loss
QUICK = [("udit-moe", 2, 2), ("dit", 4, 1)]
ALL = [
    (model, world, accum)
    for model in ("dit", "udit", "dit-moe", "udit-moe")
    for world, accum in ((1, 4), (2, 2), (4, 1))
]
CASES = [
    pytest.param(
        *case, marks=() if case in QUICK else pytest.mark.slow, id="-".join(map(str, case))
    )
    for case in ALL
]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def config(folder: Path, model: str, data: Path) -> Path:
    settings = {"steps": 20, "checkpoint__every": 1000, "model__zero_init_std": 0.05}
    if model == "dit-moe":
        # why: the published batch-wise balance knows the micro-batch; it is compared over ranks.
        settings["model__moe__aux_image"] = 0.01
        settings["model__moe__aux_batch"] = 0.0
    return tiny.write(folder, model, data, data__global_batch=16, **settings)


@pytest.fixture(scope="module")
def alone(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of one process without accumulation, by model; filled as they are asked for."""
    return {}


def reference(known: dict[str, list[float]], model: str, folder: Path, data: Path) -> list[float]:
    if model not in known:
        run = folder / "alone"
        ranks.train(config(folder, model, data), run)
        known[model] = losses(run)
    return known[model]


def difference(ours: list[float], theirs: list[float]) -> float:
    assert len(ours) == len(theirs) == 20
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("model", "world", "accum"), CASES)
def test_losses_are_equal_on_every_layout(
    model: str,
    world: int,
    accum: int,
    alone: dict[str, list[float]],
    digits: Path,
    tmp_path: Path,
) -> None:
    expected = reference(alone, model, tmp_path, digits)
    run = tmp_path / "run"
    ranks.train(config(tmp_path, model, digits), run, f"accum={accum}", world=world)
    assert difference(losses(run), expected) <= TOLERANCE


def test_the_batch_wise_balance_is_taken_over_all_ranks(digits: Path, tmp_path: Path) -> None:
    path = tiny.write(
        tmp_path,
        "dit-moe",
        digits,
        steps=20,
        checkpoint__every=1000,
        data__global_batch=16,
        model__zero_init_std=0.05,
        model__moe__aux_batch=0.1,
    )
    ranks.train(path, tmp_path / "one")
    ranks.train(path, tmp_path / "two", world=2)
    assert difference(losses(tmp_path / "two"), losses(tmp_path / "one")) <= TOLERANCE


def train_with_one_expert_doubled(*words: str) -> None:
    """Plants a fault on rank 1: the output of expert 0 is twice what it should be."""
    import os

    if os.environ["RANK"] == "1":
        honest = moe.Experts.forward

        def doubled(self, rows, counts):  # type: ignore[no-untyped-def]
            out = honest(self, rows, counts)
            first = (rows.new_ones(len(rows)).cumsum(0) <= counts[0]).to(out.dtype)
            return out * (1 + first[:, None])

        moe.Experts.forward = doubled  # type: ignore[method-assign]
    ranks.pretrain(*words)


def test_a_planted_fault_is_seen(
    alone: dict[str, list[float]], digits: Path, tmp_path: Path
) -> None:
    expected = reference(alone, "udit-moe", tmp_path, digits)
    run = tmp_path / "run"
    run.mkdir()
    words = ("train", str(config(tmp_path, "udit-moe", digits)), f"run_dir={run}")
    ranks.run(train_with_one_expert_doubled, 2, *words, log=run / "ranks.log")
    assert difference(losses(run), expected) > 10 * TOLERANCE
