"""Step times that are planned beside step times that are measured, as ratios to one calibration.

    python -m tests.speed.plan_time [--rounds N]

All configurations are stepped in turn, again and again, on one CPU thread; the CPU time of the
process counts, because the machine is shared. What the machine reaches (products, depthwise
convolutions, element-wise work) is measured in the same rounds. The plan's seconds of every
configuration, divided by those of the calibration, are held against the same ratio of what was
measured.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from parallel import launch
from parallel.kernels.depthwise import mix
from pretrain import config
from pretrain.planning import planned, roofline
from pretrain.planning.roofline import Machine
from tests.measured import assembled, batch_of

U = {"family": "udit", "depth": [1, 1, 2, 1, 1], "num_heads": 4}
CASES: dict[str, tuple[dict[str, Any], int, int]] = {  # model, latent pixels a side, images
    "calibration: DiT 192×4": ({"family": "dit", "width": 192, "depth": 4}, 16, 16),
    "DiT 384×3": ({"family": "dit", "width": 384, "depth": 3}, 16, 8),
    "DiT 192×8": ({"family": "dit", "width": 192, "depth": 8}, 16, 16),
    "DiT 192×4, batch 32": ({"family": "dit", "width": 192, "depth": 4}, 16, 32),
    "DiT 128×4, 256 tokens": ({"family": "dit", "width": 128, "depth": 4}, 32, 8),
    "DiT-MoE 192×3": (
        {"family": "dit-moe", "width": 192, "depth": 3, "moe": {"experts": 4, "hidden_ratio": 2.0}},
        16,
        16,
    ),
    "U-DiT 32": (U | {"width": 32}, 16, 16),
    "U-DiT 64": (U | {"width": 64}, 16, 8),
    "U-DiT-MoE 48": (
        U | {"width": 48, "moe": {"experts": 8, "hidden_ratio": 0.5, "stages": ["latent"]}},
        16,
        16,
    ),
}
CALIBRATION = next(iter(CASES))


@dataclass(frozen=True)
class Row:
    name: str
    seconds: float  # CPU time of a step, measured
    ratio: float  # to the calibration's
    planned: float  # the same ratio by the plan

    @property
    def error(self) -> float:
        return self.planned / self.ratio - 1


def config_of(name: str) -> config.Config:
    model, size, images = CASES[name]
    shape = {"input_size": size, "in_channels": 4, "num_classes": 10, "learn_sigma": False}
    if model["family"] != "udit":
        shape |= {"num_heads": 4, "patch": 2}
    return config.validate(
        {
            "model": model | shape,
            "objective": {"kind": "flow"},
            "data": {"path": "nowhere", "global_batch": images},
            "schedule": {"kind": "constant"},
            "steps": 10_000,
            "run_dir": "nowhere",
        }
    )


def rows(names: Sequence[str], rounds: int) -> list[Row]:
    """In a process that has joined a world of one rank; the first name is the calibration."""
    works = {name: _stepping(name) for name in names} | _parts()
    best = dict.fromkeys(works, float("inf"))
    for turn in range(1 + rounds):
        for name, work in works.items():
            begin = time.process_time()
            work()
            if turn:  # the first one warms up
                best[name] = min(best[name], time.process_time() - begin)
    machine = Machine(
        products=_PRODUCT_FLOPS / best["product"],
        depthwise=_DEPTHWISE_FLOPS / best["depthwise"],
        memory=_MOVED / best["element-wise"],
        peak=_PRODUCT_FLOPS / best["product"],
        fused=False,
    )
    made = {name: _planned(name, machine) for name in names}
    first = names[0]
    return [
        Row(name, best[name], best[name] / best[first], made[name] / made[first]) for name in names
    ]


def _planned(name: str, machine: Machine) -> float:
    one = planned.counted(config_of(name), 1)
    parts = roofline.step(one.cfg.model, one.layout, machine)
    return sum(part.total for part in parts)


def _stepping(name: str) -> Callable[[], None]:
    cfg = config_of(name)
    state, engine, mesh = assembled(cfg)
    batch = batch_of(cfg, mesh)

    def step() -> None:
        engine.step(batch)
        engine.settle(everything=True)
        state.step += 1

    return step


_SIDE, _REPEATS = 512, 4
_PRODUCT_FLOPS = 2 * _SIDE**3 * _REPEATS
_CHANNELS, _PIXELS, _IMAGES = 128, 16, 8
_DEPTHWISE_FLOPS = 3 * 2 * 25 * _CHANNELS * _PIXELS**2 * _IMAGES
_VALUES = 1 << 20
_MOVED = 4 * 8 * _VALUES * _REPEATS  # reads and writes of four passes over float32 values


def _parts() -> dict[str, Callable[[], None]]:
    """What steps are made of: products, depthwise convolutions, element-wise passes."""
    a, b = (torch.randn(_SIDE, _SIDE) for _ in range(2))
    shape = (_IMAGES, _PIXELS, _PIXELS, _CHANNELS)
    x = torch.randn(shape, requires_grad=True)
    kernel = torch.randn(_CHANNELS, 1, 5, 5, requires_grad=True)
    bias = torch.randn(_CHANNELS, requires_grad=True)
    y, z = (torch.randn(_VALUES) for _ in range(2))

    def product() -> None:
        for _ in range(_REPEATS):
            torch.mm(a, b)

    def depthwise() -> None:
        mix(x, kernel, bias).sum().backward()

    def elementwise() -> None:
        for _ in range(_REPEATS):
            F.gelu(y)
            torch.add(y, z)
            torch.mul(y, z)
            F.layer_norm(y.view(-1, 128), (128,))

    return {"product": product, "depthwise": depthwise, "element-wise": elementwise}


def measure(names: Sequence[str], rounds: int, out: Path | None = None) -> list[Row]:
    launch.join(launch.Place.here(), threads=1, timeout=timedelta(seconds=300))
    found = rows(names, rounds)
    if out is not None:
        out.write_text(json.dumps([{"name": row.name, "error": row.error} for row in found]))
    launch.leave()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    found = measure(list(CASES), parser.parse_args().rounds)
    table = Table("configuration", "CPU s a step", "ratio", "planned", "error", box=None)
    for row in found:
        cells = (f"{row.seconds:.3f}", f"{row.ratio:.2f}", f"{row.planned:.2f}")
        table.add_row(row.name, *cells, f"{100 * row.error:+.0f} %")
    Console().print(table)


if __name__ == "__main__":
    main()
