"""One command that measures everything a GPU is needed for, and fills README's table.

    make gpu-check
    python -m pretrain.benches.gpu_check --table FILE.json     the table of a result, in Markdown

Each item is a process of its own with its own limit, and all end within eight minutes; what is not
installed is skipped by name, what fails is told with its last words. Without a GPU the same items
run on tiny shapes: that tests this program, and its figures mean nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from parallel.launch import Place
from pretrain.benches.record import record
from pretrain.manifest import write_whole

WHOLE = 460.0  # seconds for all items
_LEAST = 5.0  # seconds below which an item is not begun
_DENSE = "configs/dit_xl2_in256.yaml"
_UNET = "configs/udit_l_in256.yaml"
_EXPERTS = "configs/dit_moe_xl_in256.yaml"
_FLAGSHIP = "configs/udit_xl_moe.yaml"
# What a model is cut down to where there is no GPU.
_TINY = {
    _DENSE: "model.size=null model.depth=2 model.width=32 model.num_heads=2 model.patch=4",
    _UNET: "model.size=null model.width=16 model.num_heads=2 model.depth=[1,1,1,1,1]",
    _EXPERTS: "model.size=null model.depth=2 model.width=32 model.num_heads=2 model.patch=4 "
    "model.moe.experts=4",
    _FLAGSHIP: "model.width=32 model.head_dim=16 model.depth=[1,1,1,1,1] model.moe.experts=8",
}
_TINY_BATCH = {_DENSE: 2, _UNET: 2, _EXPERTS: 2, _FLAGSHIP: 16}


@dataclass(frozen=True)
class Item:
    """One measurement."""

    name: str
    words: tuple[str, ...]  # after `python -m`
    limit: float = 60.0  # seconds
    needs: tuple[str, ...] = ()  # packages
    also: dict[str, Any] = field(default_factory=dict)  # for the table


def items(tiny: bool) -> Iterator[Item]:
    """What is measured, the most telling first."""

    def step(name: str, path: str, batch: int, *words: str, needs: tuple[str, ...] = ()) -> Item:
        size = _TINY_BATCH[path] if tiny else batch
        cut = _TINY[path].split() if tiny else []
        given = (*cut, f"data.global_batch={size}", "accum=1", *words)
        measured = ("--rounds", "2", "--steps", "1") if tiny else ("--rounds", "3", "--steps", "5")
        # a U has five kinds of block to compile, the others one or two
        limit = 120.0 if path in (_UNET, _FLAGSHIP) else 75.0
        return Item(name, ("pretrain", "bench", "step", path, *given, *measured), limit, needs)

    compiled = "compile=true"
    alone = ("--as-rank", "0", "--of", "16")
    if tiny:  # why: a compiler is minutes on a CPU
        compiled = "compile=false"
    engine = ("transformer_engine",)
    yield step("DiT-XL/2 bf16", _DENSE, 64, compiled)
    yield step("U-DiT-L bf16", _UNET, 64, compiled)
    yield step("flagship, rank 0 of 16", _FLAGSHIP, 768, compiled, *alone)
    yield step("DiT-XL/2 fp8", _DENSE, 64, compiled, "precision=fp8")
    yield step("flagship fp8, rank 0 of 16", _FLAGSHIP, 768, compiled, "precision=fp8", *alone)
    yield step("DiT-MoE-XL/2 bf16", _EXPERTS, 16, compiled, "remat.mode=selective")
    yield step("DiT-XL/2 bf16, deterministic", _DENSE, 64, compiled, "deterministic=true")
    yield step("DiT-XL/2 bf16, eager", _DENSE, 64)
    yield step(
        "DiT-XL/2 fp8, Transformer Engine",
        _DENSE,
        64,
        "precision=fp8",
        "fp8.backend=" + ("emulated" if tiny else "transformer_engine"),
        needs=() if tiny else engine,
    )
    sizes = "--tokens 256 --width 64 --experts 8" if tiny else "--tokens 16384 --width 3072"
    yield Item("experts beside dense", ("pretrain", "bench", "moe", *sizes.split()), 40.0)
    yield _attention(_UNET, tiny)
    yield _attention(_DENSE, tiny)
    yield _precision(tiny)
    few = ("--samples", "2000") if tiny else ()
    yield Item("loader", ("pretrain", "bench", "loader", *few), 40.0)
    values = "1e5" if tiny else "5e8"
    saved = ("pretrain", "bench", "checkpoint", "--params", values, "--nproc", "1")
    yield Item("checkpoint", (*saved, "--rounds", "2"), 60.0)
    tests = ("pytest", "-q", "-m", "gpu", "tests/unit", "tests/e2e")
    yield Item("tests that need a GPU", tests, 150.0, ("pytest",))


def _attention(path: str, tiny: bool) -> Item:
    words = [*_TINY[path].split(), "--images", "1", "--rounds", "1"] if tiny else ["--images", "64"]
    name = f"attention of {Path(path).stem}"
    return Item(name, ("pretrain", "bench", "attention", path, *words), 40.0)


def _precision(tiny: bool) -> Item:
    words = [*_TINY[_DENSE].split(), "--images", "2", "--steps", "4", "--rounds", "1"]
    words = words if tiny else ["model.depth=4", "--images", "64", "--steps", "20"]
    return Item("FP8 by recipe", ("pretrain", "bench", "precision", _DENSE, *words), 60.0)


def run(tiny: bool, whole: float = WHOLE) -> dict[str, Any]:
    """Runs the items one after another. Returns the record of all."""
    begin, found = time.monotonic(), []
    for item in items(tiny):
        left = whole - (time.monotonic() - begin)
        print(f"gpu-check: {item.name} …", flush=True)
        found.append(_one(item, left))
        print(f"gpu-check: {item.name}: {found[-1]['outcome']}", flush=True)
    return record("gpu-check", Place(0, 1, 0, 1)) | {
        "self_test": tiny,
        "seconds": time.monotonic() - begin,
        "driver": _driver(),
        "items": found,
    }


def _one(item: Item, left: float) -> dict[str, Any]:
    """outcome: `ok`, or why there is no result."""
    told: dict[str, Any] = {"name": item.name, "words": " ".join(item.words), "result": None}
    missing = [package for package in item.needs if not _installed(package)]
    if missing:
        return told | {"outcome": f"skipped: {', '.join(missing)} not installed"}
    if left < _LEAST:
        return told | {"outcome": "skipped: no time left"}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", *item.words]
        if item.words[0] == "pretrain":
            command += ["--out", str(out)]
        if "checkpoint" in item.words:
            command += ["--dir", folder]
        limit = min(item.limit, left)
        try:
            answer = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            return told | {"outcome": f"stopped after {limit:.0f} s"}
        result = json.loads(out.read_text()) if out.exists() else None
    nothing = item.words[0] == "pytest" and answer.returncode == 5
    if answer.returncode and not nothing:
        last = (answer.stderr.strip() or answer.stdout.strip()).splitlines()[-1:]
        return told | {"outcome": f"failed ({answer.returncode}): {''.join(last)[:200]}"}
    closing = answer.stdout.strip().splitlines()[-1:] if item.words[0] == "pytest" else []
    return told | {"outcome": "ok", "result": result, "said": "".join(closing)}


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _driver() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "cuda": torch.version.cuda,
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "memory_gb": torch.cuda.get_device_properties().total_memory / 1e9 if cuda else None,
    }


_COLUMNS = ("images_per_s", "tflops_per_rank", "mfu", "of_roofline", "peak_gb")


def table(found: dict[str, Any]) -> str:
    """The steps of a result, in Markdown, and a line on what else was found."""
    versions = found["versions"]
    lines = [
        f"{found['chip']}, torch {versions['torch']}, commit {str(found['commit'])[:10]}, "
        f"{found['date']}"
        + (". Self-test without a GPU: the figures mean nothing." if found["self_test"] else "."),
        "",
        "| what | images/s | TFLOP/s | MFU | of roofline | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    for item in found["items"]:
        result = item["result"]
        if result is not None and result["bench"] == "step":
            cells = [_cell(result.get(column)) for column in _COLUMNS]
            lines.append(f"| {item['name']} | {' | '.join(cells)} |")
    others = [item for item in found["items"] if (item["result"] or {}).get("bench") != "step"]
    lines += ["", "; ".join(f"{item['name']}: {_summary(item)}" for item in others) + "."]
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _summary(item: dict[str, Any]) -> str:
    result = item["result"]
    if result is None:
        return item.get("said") or item["outcome"]
    match result["bench"]:
        case "moe":
            return ", ".join(f"{row['layer']} {row['share']:.2f}" for row in result["rows"])
        case "precision":
            rows = result["recipes"]
            return ", ".join(f"{r['recipe']} {r['gain']:.2f}× {r['gap']:+.2%}" for r in rows)
        case "attention":
            best = max((row["tflops"] or 0.0 for row in result["rows"]), default=0.0)
            return f"best {best:.3g} TFLOP/s"
        case "loader":
            return f"{result['samples_per_s']:.0f} samples/s, {result['share']:.2f} of raw reads"
    return item["outcome"]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--self-test", action="store_true", help="tiny shapes, also on a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="directory")
    parser.add_argument("--table", type=Path, help="print the table of a result and end")
    given = parser.parse_args(words)
    if given.table is not None:
        print(table(json.loads(given.table.read_text())))
        return 0
    tiny = given.self_test or not torch.cuda.is_available()
    found = run(tiny)
    chip = "-".join(str(found["chip"]).split())
    name = f"{chip}-{str(found['commit'])[:10]}{'-self-test' if tiny else ''}"
    given.out.mkdir(parents=True, exist_ok=True)
    for ending, text in ((".json", json.dumps(found, indent=1)), (".md", table(found) + "\n")):
        write_whole(given.out / f"{name}{ending}", text)
    print(table(found))
    print(f"gpu-check: {found['seconds']:.0f} s, {given.out / name}.json and .md")
    failed = [item["name"] for item in found["items"] if item["outcome"].startswith("failed")]
    if failed:
        print(f"gpu-check: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
