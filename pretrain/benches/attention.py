"""Attention of each kind of block of a model, by each kernel there is for it, both ways.

pretrain bench attention configs/udit_l_in256.yaml --images 8
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from parallel import launch
from parallel.kernels import phases
from pretrain.benches.record import record
from pretrain.models.build import ModelConfig
from pretrain.models.udit import STAGES, UDiTConfig

_TILE = None  # ours, of all phase grids of a small image
_KERNELS: dict[str, dict[str, SDPBackend | None]] = {
    "cuda": {
        "one tile": _TILE,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    },
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
}


class Shape(NamedTuple):
    """One kind of attention: `sets` token sets an image, which know nothing of each other."""

    where: str
    sets: int
    heads: int
    tokens: int  # of a set
    head_dim: int

    def flops(self, images: int) -> int:
        """Forward and backward: two products, 2 a MAC, 3 passes."""
        return 12 * images * self.sets * self.heads * self.tokens**2 * self.head_dim


def shapes(cfg: ModelConfig) -> list[Shape]:
    """The kinds of attention of a model, each once."""
    if isinstance(cfg, UDiTConfig):
        found = []
        for stage, (_, down, _) in STAGES.items():
            heads, side = cfg.stage_heads(stage), cfg.input_size // down // 2
            found.append(Shape(stage, 4, heads, side**2, cfg.stage_width(stage) // heads))
        return found
    tokens = (cfg.input_size // cfg.patch) ** 2
    return [Shape("blocks", 1, cfg.num_heads, tokens, cfg.width // cfg.num_heads)]


def attention(cfg: ModelConfig, images: int, rounds: int) -> dict[str, Any]:
    """Seconds and TFLOP/s of each kernel at each shape, medians of interleaved rounds.

    A kernel that does not take a shape has no seconds, and `why` says what it said.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[dict[str, Any]] = []
    for shape in shapes(cfg):
        works = {
            name: _both_ways(shape, images, kernel, device, dtype)
            for name, kernel in _KERNELS[device.type].items()
        }
        rows += _timed(shape, images, works, rounds, device)
    place = launch.Place.here()
    return record("attention", place) | {"dtype": str(dtype), "images": images, "rows": rows}


def _timed(
    shape: Shape,
    images: int,
    works: dict[str, Callable[[], None]],
    rounds: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {name: [] for name in works}
    refused: dict[str, str] = {}
    for turn in range(1 + rounds):
        for name, work in works.items():
            if name in refused:
                continue
            begin = time.perf_counter()
            try:
                work()
            except RuntimeError as error:
                refused[name] = str(error).partition("\n")[0]
                continue
            if device.type == "cuda":
                torch.cuda.synchronize()  # sync: what is timed ends here
            if turn:
                times[name].append(time.perf_counter() - begin)
    rows = []
    for name in works:
        seconds = statistics.median(times[name]) if times[name] else None
        rows.append(
            shape._asdict()
            | {
                "kernel": name,
                "seconds": seconds,
                "tflops": shape.flops(images) / seconds / 1e12 if seconds else None,
                "why": refused.get(name),
            }
        )
    return rows


def _both_ways(
    shape: Shape, images: int, kernel: SDPBackend | None, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    size = (images * shape.sets, shape.tokens, shape.heads, shape.head_dim)  # as linears give them
    draws = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(size, generator=draws).to(device, dtype).requires_grad_() for _ in range(3)
    )
    grad = torch.ones(size, device=device, dtype=dtype).transpose(1, 2)

    def attend() -> Tensor:
        queries, keys, values = (t.transpose(1, 2) for t in (q, k, v))
        if kernel is not _TILE:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(queries, keys, values)
        if shape.sets != 4 or not phases.fits(queries, keys, values):
            raise RuntimeError("one tile takes the four phase grids of at most 64 tokens")
        return phases.attention(queries, keys, values)

    def work() -> None:
        attend().backward(grad)
        q.grad = k.grad = v.grad = None

    return work
