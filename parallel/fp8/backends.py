"""Which code multiplies in FP8 on a machine, and what it cannot do; every refusal says why."""

from collections.abc import Mapping
from importlib.util import find_spec

import torch

from parallel.errors import LayoutError
from parallel.fp8.recipes import Backend, FP8Config

HOPPER, BLACKWELL = (9, 0), (10, 0)  # compute capabilities
INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]'"


def capability(device: torch.device) -> tuple[int, int] | None:
    """Of a GPU; None for what is none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def backend_for(cfg: FP8Config, chip: tuple[int, int] | None) -> Backend:
    """Raises LayoutError if the one asked for cannot run on a chip of this capability."""
    able = chip is not None and chip >= HOPPER
    if cfg.backend == "emulated":
        return "emulated"
    if cfg.backend == "auto":
        if not able:
            return "emulated"
        return "transformer_engine" if installed() else "torch"
    if not able:
        here = "a CPU" if chip is None else f"a GPU of {chip[0]}.{chip[1]}"
        raise LayoutError(
            f"fp8.backend={cfg.backend} needs a GPU of compute capability 9.0 or above, this is "
            f"{here}; set fp8.backend=auto, which emulates FP8 where there is none"
        )
    if cfg.backend == "transformer_engine" and not installed():
        raise LayoutError(
            "fp8.backend=transformer_engine needs Transformer Engine, which is not installed; "
            f"{INSTALL}, or set fp8.backend=torch"
        )
    return cfg.backend


def installed() -> bool:
    return find_spec("transformer_engine") is not None


def check_attention(
    cfg: FP8Config, chip: tuple[int, int] | None, head_dims: Mapping[str, int]
) -> None:
    """Raises LayoutError if attention cannot train in FP8 on this chip.

    head_dims: channels of a head, by what sets them.
    """
    if not cfg.attention or backend_for(cfg, chip) == "emulated":
        return
    if backend_for(cfg, chip) == "torch":
        raise LayoutError(
            "fp8.attention=true needs Transformer Engine: torch has no FP8 attention with a "
            f"backward; {INSTALL}, or set fp8.attention=false"
        )
    assert chip is not None
    for what, size in head_dims.items():
        if chip < BLACKWELL and size != 128:
            raise LayoutError(
                f"fp8.attention=true with {size} channels a head ({what}): on Hopper FP8 attention "
                "trains only at head_dim exactly 128 (cuDNN's fused kernel); set "
                "model.head_dim=128, or fp8.attention=false"
            )
