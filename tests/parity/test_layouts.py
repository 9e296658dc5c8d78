"""The loss does not know the layout: some cells of the parity table, all of them in `make slow`."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests import ranks, tiny
from tests.parity import faults
from tests.parity.table import (
    BY_NAME,
    LAYOUTS,
    MODELS,
    UNDER_MUP,
    Layout,
    Runs,
    bf16_spread,
    encoded,
    relative,
    series,
)

QUICK = {
    "dit": ("HSDP 2×2", "tp4", "ZeRO-1×tp2", "ZeRO-3"),
    "udit": (),
    "dit-moe": ("ep4", "ep2×tp2", "ordered dp2×tp2", "remat×ep2", "ZeRO-2×ep2"),
    "udit-moe": ("dp2×ep2×tp2", "accumulation 4"),
    "dit-moe+mup": ("ZeRO-2×ep2",),
    "udit-moe+mup": ("tp2",),
}
# Where the factors meet the cuts: other layouts only move what these cut.
CUT = ("dp2", "tp2", "ep2", "ZeRO-2", "ZeRO-2×ep2", "ZeRO-3", "dp2×ep2×tp2")
CELLS = [
    pytest.param(
        model,
        layout.name,
        marks=() if layout.name in QUICK[model] else pytest.mark.slow,
        id=f"{model}-{layout.name}",
    )
    for model in MODELS + UNDER_MUP
    for layout in LAYOUTS
    if model in MODELS or layout.name in CUT
    # why: minutes of compiling; the U-DiT with experts has the same blocks, and what an axis adds
    # to a graph, DiT-MoE has. `make parity` has them all.
    if (model, layout.name) != ("udit", "compile")
    and (model == "dit-moe" or not layout.name.startswith("compile×"))
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("parity")
    return Runs(encoded(folder), folder, steps=5)


@pytest.fixture(scope="module")
def alone(runs: Runs) -> Callable[[str], dict[str, str]]:
    """Digests of what one process starts from, by model."""
    return cache(lambda model: runs.digests(model, Layout("1", 1)))


@pytest.mark.parametrize(("model", "layout"), CELLS)
def test_losses_norms_and_weights_are_equal_on_every_layout(
    model: str, layout: str, runs: Runs
) -> None:
    cell = runs.cell(model, BY_NAME[layout])
    dense = "moe" not in model
    if layout == "ZeRO-3×ep2" or (dense and ("ep" in layout or "static" in layout)):
        assert cell.refused, cell
        return
    assert not cell.refused
    assert cell.green, f"{cell} in {cell.worst}"


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_planted_fault_is_seen(fault: str, runs: Runs) -> None:
    model, layout = faults.FAULTS[fault]
    assert not runs.cell(model, BY_NAME[layout], fault=fault).green


@pytest.mark.parametrize(
    ("model", "steps"),
    [("dit", 20), pytest.param("dit-moe", 50, marks=pytest.mark.slow)],
)
def test_bf16_stays_within_what_reordered_sums_do(model: str, steps: int, runs: Runs) -> None:
    spread, found = bf16_spread(Runs(runs.data, runs.folder, steps=steps), model)
    assert 0 < spread < 0.01
    assert all(apart <= 2 * spread for apart in found.values()), (spread, found)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("dit-moe", "dp2×ep2×tp2"),
        *(
            pytest.param("udit-moe", layout.name, marks=pytest.mark.slow)
            for layout in LAYOUTS
            if layout.name in CUT or layout.name in ("HSDP 2×2", "ep4×tp2", "offload dp2")
        ),
    ],
)
def test_every_layout_starts_from_the_same_weights(
    model: str, layout: str, runs: Runs, alone: Callable[[str], dict[str, str]]
) -> None:
    assert runs.digests(model, BY_NAME[layout]) == alone(model)


def test_the_batch_wise_balance_is_taken_over_all_ranks(digits: Path, tmp_path: Path) -> None:
    path = tiny.write(
        tmp_path,
        "dit-moe",
        digits,
        steps=5,
        checkpoint__every=1000,
        data__global_batch=16,
        model__zero_init_std=0.05,
        model__moe__aux_batch=0.1,
    )
    ranks.train(path, tmp_path / "one")
    ranks.train(path, tmp_path / "four", "mesh.tp=2", "mesh.ep=2", world=4)
    one, four = (series(tmp_path / name, "loss") for name in ("one", "four"))
    assert relative(four, one) <= 2e-6
