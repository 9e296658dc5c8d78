"""Where the Triton kernels beside this file run: on contiguous tensors of a GPU.

Triton is looked for without importing it, and imported at first use. Without it a warning says so
once, and the plain twins run.
"""

import importlib
import importlib.util
import os
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# why: in Triton's interpreter a test may give tensors of a CPU; else those are for C.
in_interpreter = False
_DTYPES = (torch.float32, torch.bfloat16)


def fits(*tensors: Tensor | None) -> bool:
    """Whether a Triton kernel takes these: contiguous, and as `takes`."""
    return all(t is None or t.is_contiguous() for t in tensors) and takes(*tensors)


def takes(*tensors: Tensor | None) -> bool:
    """Whether they are float32 or bfloat16 and on a GPU."""
    kind = "cpu" if in_interpreter and os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != kind or tensor.dtype not in _DTYPES:
            return False
    return _there()


def kernels(name: str) -> Any:
    """The module triton_<name> beside this file, imported at first use."""
    return importlib.import_module(f"parallel.kernels.triton_{name}")


@torch.compiler.assume_constant_result
def _there() -> bool:
    """For a compiler that reads along, and would trace neither the search nor the warning."""
    return _installed()


@lru_cache(maxsize=1)
def _installed() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "GPU kernels are off, plain torch operators run instead, slower: no triton found. "
        "Install triton, which comes with torch for CUDA",
        stacklevel=4,
    )
    return False
