"""How fast the core models are beside each other on this CPU, in one interleaved run.

    python -m tests.speed.ratios [--rounds 5] [--threads 2] [--only a,b] [--out ratios.json]

fp32, batch 8, latents 32×32×4, forward and backward of the hybrid loss. Medians over rounds, wall
time and the process's CPU time ÷ threads; a ratio is met by its wall time. Exit code 1 if one is
not. Other work on the machine shows as wall time above CPU time, and in both once threads wait.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from parallel.kernels import native
from parallel.launch import keep_freed_memory
from parallel.remat import compile_units
from pretrain.models.build import build
from pretrain.models.dit import DiTConfig, DiTMoEConfig
from pretrain.models.init import initialise
from pretrain.models.moe import MoE, MoEConfig
from pretrain.models.udit import UDiTConfig
from pretrain.objectives import DDPM
from pretrain.planning.macs import flops_per_image
from tests.speed import twin

BATCH, SIZE = 8, 32
Run = Callable[[], None]


class Ratio(NamedTuple):
    what: str
    over: str  # the run whose time is divided …
    under: str  # … by this one's
    wanted: float
    at_most: bool = False


RATIOS = {
    "a": Ratio("U-DiT-S ÷ DiT-S/2", "U-DiT-S", "DiT-S/2", 1.5, True),
    "b": Ratio("plain twin ÷ U-DiT-S", "plain twin", "U-DiT-S", 1.5),
    "c": Ratio("GFLOP/s of DiT-MoE-S/2-8E2A ÷ DiT-S/2", "DiT-S/2", "DiT-MoE-S/2-8E2A", 0.95),
    "d": Ratio("loop over 64 experts ÷ our layer", "loop of experts", "our experts", 1.5),
    "e": Ratio("DiT-S/2 eager ÷ compiled", "DiT-S/2", "DiT-S/2 compiled", 1.05),
    "f": Ratio("the same, without our kernels ÷ compiled", "no kernels", "DiT-S/2 compiled", 1.05),
}
CONFIGS: dict[str, Any] = {
    "DiT-S/2": DiTConfig(size="S/2"),  # type: ignore[call-arg]
    "DiT-S/2 compiled": DiTConfig(size="S/2"),  # type: ignore[call-arg]
    "no kernels": DiTConfig(size="S/2"),  # type: ignore[call-arg]
    "U-DiT-S": UDiTConfig(size="S"),  # type: ignore[call-arg]
    "plain twin": UDiTConfig(size="S"),  # type: ignore[call-arg]
    "DiT-MoE-S/2-8E2A": DiTMoEConfig(size="S/2-8E2A"),  # type: ignore[call-arg]
}


def prepare(name: str) -> Run:
    """Forward and backward of one of the runs."""
    run = _layer(name) if "experts" in name else _model(name)
    return _without_kernels(run) if name == "no kernels" else run


def _without_kernels(run: Run) -> Run:
    kernels = native.library

    def plain() -> None:
        native.library = lambda: None  # type: ignore[assignment]
        try:
            run()
        finally:
            native.library = kernels

    return plain


def _model(name: str) -> Run:
    model = build(CONFIGS[name])
    initialise(model, seed=0, zero_std=0.02)
    if name.endswith("compiled"):
        compile_units(model.units())
    objective = DDPM()
    x, noise = torch.randn(2, BATCH, 4, SIZE, SIZE)
    t, labels = objective.time(torch.rand(BATCH)), torch.arange(BATCH)
    x_t = objective.corrupt(x, noise, t)
    plain = name == "plain twin"

    def run() -> None:
        model.zero_grad()
        if plain:
            pred = twin.forward(model, x_t, objective.embed(t), labels)
        else:
            pred = model(x_t, objective.embed(t), labels)
        objective.loss(pred, x, noise, t).mean().backward()

    return run


def _layer(name: str) -> Run:
    width = 384
    layer = MoE(width, MoEConfig(experts=64, top_k=4, hidden_ratio=0.25, balance="none"), None)
    initialise(layer, seed=0, zero_std=0.02)
    looped = twin.LoopedExperts(layer)
    x, cond = torch.randn(BATCH, 256, width, requires_grad=True), torch.randn(BATCH, width)
    module: Any = looped if name.startswith("loop") else layer

    def run() -> None:
        module.zero_grad()
        out = module(x, x.detach(), cond)
        (out if isinstance(out, torch.Tensor) else out[0]).square().sum().backward()

    return run


def measure(names: list[str], rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds of each run, taken in turn."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as every run on a CPU does
    torch.manual_seed(0)
    runs = {name: prepare(name) for name in names}
    for run in runs.values():
        run()
        run()
    wall: dict[str, list[float]] = {name: [] for name in names}
    used: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, run in runs.items():
            repeats = 5 if "experts" in name else 1
            wall_0, used_0 = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                run()
            wall[name].append((time.perf_counter() - wall_0) / repeats)
            used[name].append((time.process_time() - used_0) / repeats / threads)
    return {
        name: {
            "wall_s": statistics.median(wall[name]),
            "cpu_s": statistics.median(used[name]),
            "wall_min_s": min(wall[name]),
        }
        for name in names
    }


def ratio(key: str, times: dict[str, dict[str, float]], clock: str) -> float:
    """One ratio by one clock; (c) is of GFLOP/s, the others of times."""
    what = RATIOS[key]
    found = times[what.over][clock] / times[what.under][clock]
    if key == "c":
        found *= flops_per_image(CONFIGS[what.under]) / flops_per_image(CONFIGS[what.over])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default=",".join(RATIOS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    keys = args.only.split(",")
    if unknown := set(keys) - set(RATIOS):
        parser.error(f"--only {args.only}: {', '.join(unknown)} is none of {', '.join(RATIOS)}")
    names = list(dict.fromkeys(n for key in keys for n in RATIOS[key][1:3]))
    times = measure(names, args.rounds, args.threads)
    table = Table("ratio", "wanted", "wall", "CPU", "best wall", "met")
    report: dict[str, Any] = {"rounds": args.rounds, "threads": args.threads, "times": times}
    report["ratios"], missed = {}, False
    for key in keys:
        what = RATIOS[key]
        wall, used, best = (ratio(key, times, c) for c in ("wall_s", "cpu_s", "wall_min_s"))
        met = wall <= what.wanted if what.at_most else wall >= what.wanted
        missed |= not met
        wanted = f"{'≤' if what.at_most else '≥'} {what.wanted}"
        numbers = (f"{v:.3f}" for v in (wall, used, best))
        table.add_row(f"{key} {what.what}", wanted, *numbers, "yes" if met else "no")
        report["ratios"][key] = {
            **what._asdict(),
            "wall": wall,
            "cpu": used,
            "best_wall": best,
            "met": met,
        }
    console = Console()
    console.print(table)
    seconds = Table("run", "wall s", "CPU s ÷ threads", "best wall s")
    for name, clocks in times.items():
        seconds.add_row(name, *(f"{clocks[c]:.3f}" for c in ("wall_s", "cpu_s", "wall_min_s")))
    console.print(seconds)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1))
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
