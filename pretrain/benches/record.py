"""What every bench's result says of itself: which bench, on what, when, of which commit."""

from datetime import date
from pathlib import Path
from typing import Any

import torch

from parallel.launch import Place
from parallel.links import nodes_of
from pretrain.run import environment


def record(bench: str, place: Place) -> dict[str, Any]:
    """The head of a result; also of one that this process made alone."""
    facts = environment()
    return {
        "bench": bench,
        "chip": chip(),
        "commit": facts["commit"],
        "versions": {"python": facts["python"], **facts["packages"]},
        "date": date.today().isoformat(),
        "ranks": place.world,
        "nodes": nodes_of(place),
    }


def chip() -> str:
    """Name of the GPU, else of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "CPU")
