"""Which code multiplies in FP8 on this machine; what is missing is said, with how to install it."""

from importlib.util import find_spec

import torch

from parallel.errors import LayoutError
from parallel.fp8.recipes import Backend, FP8Config

HOPPER = (
    9,
    0,
)  # compute capability of the first chips that train in FP8; Ada has no grouped kernel
INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]'"


def backend_for(cfg: FP8Config, device: torch.device) -> Backend:
    """Raises LayoutError if the one asked for cannot run here."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER
    if cfg.backend == "auto":
        if not able:
            return "emulated"
        return "transformer_engine" if installed() else "torch"
    if cfg.backend == "emulated" or able:
        return checked(cfg.backend)
    raise LayoutError(
        f"fp8.backend={cfg.backend} multiplies on a GPU of compute capability 9.0 or above, and "
        f"this is {_name(device)}; set fp8.backend=auto, which emulates FP8 where there is none"
    )


def checked(backend: Backend) -> Backend:
    """Raises LayoutError if it is not installed."""
    if backend == "transformer_engine" and not installed():
        raise LayoutError(
            "fp8.backend=transformer_engine needs Transformer Engine, which is not installed; "
            f"{INSTALL}, or set fp8.backend=torch"
        )
    return backend


def installed() -> bool:
    return find_spec("transformer_engine") is not None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type}"
