"""Some pairs of the save/load matrix, the rest in `make torture`; its judge sees faults."""

from pathlib import Path

import pytest

from parallel import storage
from pretrain import manifest
from tests.torture.matrix import Matrix, pairs

QUICK = [("ep2", "1"), ("1", "ep2"), ("ZeRO-2×ep2", "ep2"), ("ep2", "ZeRO-2×ep2")]
MODELS = ("dit-moe", *(pytest.param(m, marks=pytest.mark.slow) for m in ("dit", "udit-moe")))


@pytest.fixture(scope="module")
def matrix(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(digits, tmp_path_factory.mktemp("matrix"), "dit-moe")


def test_what_one_layout_saves_another_loads(matrix: Matrix) -> None:
    cells = matrix.cells(QUICK)
    assert {pair: cell.wrong for pair, cell in cells.items()} == {pair: [] for pair in QUICK}
    assert all(cell.experts > 0 for cell in cells.values())


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_whole_matrix(model: str, digits: Path, tmp_path: Path) -> None:
    cells = Matrix(digits, tmp_path, model).cells(pairs(model))
    assert not {pair: cell.wrong for pair, cell in cells.items() if cell.wrong}


def test_two_experts_that_change_places_are_seen(matrix: Matrix, tmp_path: Path) -> None:
    whole = matrix.calm / "checkpoints" / "step_00000003"
    tensors = storage.read_alone(list(storage.contents(whole)), whole)
    name = next(n for n in tensors if n.startswith("model.") and ".experts." in n)
    tensors[name] = tensors[name][[1, 0, *range(2, len(tensors[name]))]]
    facts = manifest.read_manifest(whole)
    state = {key: facts.pop(key) for key in ("format", "files", "tensors", "state")}["state"]
    copy = tmp_path / "checkpoints" / whole.name
    manifest.write_alone(copy, tensors.items(), state, facts)
    wrong: list[str] = []
    matrix.experts(whole, tmp_path, wrong)
    assert wrong == [f"{name}: other experts", f"{name}: an expert is in another's place"]


def test_both_engines_and_ten_layouts_are_in_the_matrix() -> None:
    for model in ("dit", "dit-moe"):
        names = {name for pair in pairs(model) for name in pair}
        assert len(pairs(model)) >= 30
        assert any("ZeRO" in name for name in names)
    everywhere = {
        name for model in ("dit", "dit-moe", "udit-moe") for p in pairs(model) for name in p
    }
    assert len(everywhere) >= 10
