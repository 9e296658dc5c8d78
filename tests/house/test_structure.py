"""The house keeps its shape: who imports whom, how long a page is, what README promises."""

import ast
import json
import re
from pathlib import Path

import pytest

from pretrain import config
from pretrain.benches import gpu_check

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pretrain", "parallel", "data_pipeline")
FORBIDDEN = {
    "parallel": {"pretrain", "data_pipeline"},
    "data_pipeline": {"pretrain", "parallel"},
    "pretrain": set(),
}
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[Path]:
    """The project's files that a file imports."""
    found = {ROOT / (name.replace(".", "/") + ".py") for name in imports(path)}
    return {file for file in found if file.is_file()}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_down_only(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        above = {name.split(".")[0] for name in imports(path)} & FORBIDDEN[package]
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_no_file_imports_itself_in_a_circle() -> None:
    graph = {path: ours(path) for path in SOURCES}
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " → ".join(p.name for p in (*trail, path))
        if path not in done:
            for below in graph.get(path, set()):
                visit(below, (*trail, path))
            done.add(path)

    for path in SOURCES:
        visit(path, ())


def test_the_models_know_no_mesh_and_no_objective() -> None:
    for path in (ROOT / "pretrain" / "models").rglob("*.py"):
        known = {name for name in imports(path) if name.startswith(("pretrain", "parallel"))}
        allowed = (
            "pretrain.models",
            "parallel.experts",
            "parallel.fp8",
            "parallel.dispatch",
            "parallel.tensor",
            "parallel.kernels",
            "parallel.shards",
        )
        others = {name for name in known if not name.startswith(allowed)}
        assert not others, f"{path.name} imports {others}"


@pytest.mark.parametrize("name", ["objectives", "noise", "schedules"])
def test_pure_parts_import_no_sibling(name: str) -> None:
    assert not {n for n in imports(ROOT / "pretrain" / f"{name}.py") if n.startswith("pretrain")}


def test_only_the_page_and_the_commands_see_the_root_config() -> None:
    names = "train cli cli_cluster cli_tune wrong_input trained imports planned preflight demo"
    names += " health submit tune tune_target cli_bench step foretold"
    allowed = {f"{name}.py" for name in names.split()}
    for path in SOURCES:
        if path.name not in allowed:
            seen = {n for n in imports(path) if n.startswith("pretrain.config")}
            assert not seen, f"{path.name} imports {seen}"


def test_the_page_is_one_page() -> None:
    assert len((ROOT / "pretrain" / "train.py").read_text().splitlines()) <= 160


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and path.name not in (
            "train.py",
            "cli.py",
            "cli_data.py",
        ):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 70, f"{node.name} has {length} lines"
    assert path.name not in ("utils.py", "common.py", "base.py")


def test_packages_are_plain_folders() -> None:
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").read_text() == ""


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_is_valid_and_says_what_it_is(path: Path) -> None:
    config.load(path, [])
    first = path.read_text().splitlines()[0]
    assert first.startswith("# "), "a config opens with a comment: what, command, hardware, result"


def test_every_path_in_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(
        r"\b((?:pretrain|parallel|data_pipeline|configs|tests|slurm)/[\w./*-]+\.\w+)", text
    )
    for name in named:
        made = name.replace("_tuned.yaml", ".yaml")  # by `pretrain tune --target`, beside it
        assert list(ROOT.glob(made)), f"README names {name}, which does not exist"


def test_the_gpu_table_is_that_of_the_committed_result() -> None:
    """README shows what gpu-check measured and nothing else; without a result it says so."""
    text = (ROOT / "README.md").read_text()
    shown = text.partition("<!-- gpu-check -->")[2].partition("<!-- /gpu-check -->")[0].strip()
    results = sorted((ROOT / "configs" / "results").glob("*.json"))
    if not results:
        assert shown.startswith("No GPU has run this yet")
        return
    found = [json.loads(path.read_text()) for path in results]
    assert not any(result["self_test"] for result in found)
    assert shown == "\n\n".join(gpu_check.table(result) for result in found)
