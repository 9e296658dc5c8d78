"""The C kernels beside this file, compiled at first use and loaded.

Compiled with the machine's own `cc` for its own processor, kept under `$PRETRAIN_CACHE` or
`~/.cache/dit-pretrain`, by a name that holds everything the result depends on. Several ranks may
compile at once: each writes to a name of its own and renames it. Without a compiler a warning says
so once, and the plain twins run. OpenMP is torch's own, with torch's number of threads.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HERE = Path(__file__).parent
_SOURCES = ("lanes.c", "depthwise.c", "norm.c", "heads.c", "swiglu.c")
_HEADERS = ("lanes.h",)
# why: no -ffast-math. Sums keep their order, and what is not finite stays so.
_FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno"),
    *("-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", "-std=gnu11"),
)


def fits(*tensors: Tensor | None) -> bool:
    """Whether a C kernel takes these: contiguous, and as `takes`."""
    return all(t is None or t.is_contiguous() for t in tensors) and takes(*tensors)


def takes(*tensors: Tensor | None) -> bool:
    """Whether they are float32 and on a CPU whose kernels compiled."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            return False
    return library() is not None


def call(name: str, *args: Tensor | int | float | None) -> None:
    """Runs a C kernel on tensors, sizes and numbers, on torch's threads."""
    function = getattr(library(), name)
    if function.argtypes is None:
        function.argtypes = [*map(_kind, args), ctypes.c_int]
    given = (arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
    function(*given, torch.get_num_threads())


def _kind(arg: Tensor | int | float | None) -> Any:
    """What C takes for an argument; the same at every call."""
    if arg is None or isinstance(arg, Tensor):
        return ctypes.c_void_p
    return ctypes.c_float if isinstance(arg, float) else ctypes.c_long


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there is no compiler that can make them."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return _without("no C compiler found (cc, gcc or $CC)")
    folder = Path(os.environ.get("PRETRAIN_CACHE") or Path.home() / ".cache" / "dit-pretrain")
    try:
        target = folder / f"kernels_{_key(compiler)}.so"
        if not target.is_file():
            _compile(compiler, target)
        return ctypes.CDLL(str(target))
    except subprocess.CalledProcessError as error:
        return _without(f"{compiler} failed: {error.stderr.strip().splitlines()[-1:]}")
    except OSError as error:
        return _without(str(error))


def _without(reason: str) -> None:
    warnings.warn(
        f"CPU kernels are off, plain torch operators run instead, slower: {reason}. Install gcc, "
        "or set CC to a compiler and PRETRAIN_CACHE to a folder that can be written",
        stacklevel=3,
    )


def _compile(compiler: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        sources = [str(_HERE / source) for source in _SOURCES]
        command = [compiler, *_FLAGS, *sources, "-o", name, "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _key(compiler: str) -> str:
    """Of sources, flags, compiler and processor."""
    digest = hashlib.sha256()
    for name in (*_HEADERS, *_SOURCES):
        digest.update((_HERE / name).read_bytes())
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    for part in (*_FLAGS, version.stdout, platform.machine(), _processor()):
        digest.update(part.encode())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))
