"""What every parameter and buffer starts as, and `initialise`, which makes it so on any layout.

A leaf module declares `self.inits = {"weight": Xavier(...), ...}` for each parameter and buffer it
owns. The value of row r of a tensor is a function of (seed, tensor name, r) alone, so a rank that
holds a shard fills its shard and nothing else, and every layout starts from the same model.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from parallel.shards import Box, box_of, local

# perf: values made at a time; 4 M keeps the float64 normals of one piece near 0.1 GB.
_PIECE = 1 << 22
_Draw = Callable[[np.ndarray, int, float], np.ndarray]  # (words, values a row, scale) -> values


@dataclass(frozen=True)
class Uniform:
    """Uniform in [-bound, bound)."""

    bound: float


@dataclass(frozen=True)
class Xavier:
    """Xavier-uniform. The fans are stated, because a shape alone does not tell them for
    convolutions, experts and the separate q, k, v of one published fused matrix.
    """

    fan_in: int
    fan_out: int


@dataclass(frozen=True)
class Normal:
    """Zero-mean normal."""

    std: float


@dataclass(frozen=True)
class Zero:
    """Zero in the recipe; N(0, zero_std) when a test asks `initialise` for perturbed zeros."""


@dataclass(frozen=True)
class Fill:
    """One value everywhere, never perturbed."""

    value: float


@dataclass(frozen=True)
class Table:
    """A fixed table, recomputed and never stored."""

    make: Callable[[], Tensor]


Init = Uniform | Xavier | Normal | Zero | Fill | Table


def xavier_conv(shape: tuple[int, int, int, int]) -> Xavier:
    """Fans of a convolution kernel (O, I/groups, k, k) by torch's rule, which ignores groups."""
    out, inner, height, width = shape
    return Xavier(inner * height * width, out * height * width)


class Filler:
    """Gives every parameter and buffer of a model its start, as a function of (seed, name, row).

    Raises AssertionError for a tensor that declares no init, or a declaration without a tensor: the
    model is at fault, not its user.
    """

    def __init__(self, model: nn.Module, seed: int, zero_std: float = 0.0) -> None:
        """zero_std: standard deviation given to tensors that the recipe zero-initialises (0 = the
        recipe). The model may be on meta, and cut.
        """
        self._seed, self._zero_std = seed, zero_std
        self._starts: dict[str, tuple[Init, Box]] = {}
        for prefix, module in model.named_modules():
            inits: dict[str, Init] = vars(module).get("inits", {})
            boxes: dict[str, Box] = vars(module).get("boxes", {})
            own = {**module._parameters, **module._buffers}
            own = {name: tensor for name, tensor in own.items() if tensor is not None}
            for name in inits:
                assert name in own, (
                    f"{prefix}: init declared for {name}, which is no parameter or buffer"
                )
            for name, tensor in own.items():
                full = f"{prefix}.{name}" if prefix else name
                assert name in inits, f"{full} declares no init"
                self._starts[full] = (inits[name], boxes.get(name) or box_of(tensor))

    @property
    def boxes(self) -> dict[str, Box]:
        """Where this rank's part of each tensor lies, by name."""
        return {name: box for name, (_, box) in self._starts.items()}

    def __call__(self, name: str, local: Tensor) -> None:
        """Fills this rank's part of one tensor."""
        self.fill(name, local, self._starts[name][1])

    @torch.no_grad()
    def fill(self, name: str, local: Tensor, box: Box) -> None:
        """Fills any box of one tensor, wherever this rank's part of it lies. local: as the box."""
        assert not local.is_meta, f"{name} is on meta: call to_empty first"
        init, _ = self._starts[name]
        match init:
            case Table(make):
                local.copy_(make())
            case Fill(value):
                local.fill_(value)
            case Zero() if self._zero_std == 0.0:
                local.zero_()
            case Zero():
                self._rows(name, local, box, _normal, self._zero_std)
            case Normal(std):
                self._rows(name, local, box, _normal, std)
            case Uniform(bound):
                self._rows(name, local, box, _uniform, bound)
            case Xavier(fan_in, fan_out):
                self._rows(name, local, box, _uniform, math.sqrt(6.0 / (fan_in + fan_out)))

    def _rows(self, name: str, local: Tensor, box: Box, draw: "_Draw", scale: float) -> None:
        _fill_rows(local, box, _Stream(self._seed, name, draw, scale))


def initialise(model: nn.Module, seed: int, zero_std: float = 0.0) -> None:
    """Fills every parameter and buffer; to be called once after `to_empty`. See `Filler`."""
    fill = Filler(model, seed, zero_std)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        fill(name, local(tensor))


def _fill_rows(local: Tensor, box: Box, stream: "_Stream") -> None:
    if local.numel() == 0:
        return
    if len(box.shape) < 2:
        row = stream.rows(0, 1, max(1, math.prod(box.shape))).reshape(box.shape)
        inside = tuple(slice(o, o + n) for o, n in zip(box.offset, box.sizes, strict=True))
        local.copy_(torch.from_numpy(np.ascontiguousarray(row[inside])))
        return
    size = math.prod(box.shape[1:])
    inner = tuple(slice(o, o + n) for o, n in zip(box.offset[1:], box.sizes[1:], strict=True))
    step = max(1, _PIECE // size)
    for start in range(0, local.shape[0], step):
        stop = min(start + step, local.shape[0])
        rows = stream.rows(box.offset[0] + start, box.offset[0] + stop, size)
        rows = rows.reshape(stop - start, *box.shape[1:])[(slice(None), *inner)]
        local[start:stop].copy_(torch.from_numpy(np.ascontiguousarray(rows)))


def _uniform(words: np.ndarray, size: int, bound: float) -> np.ndarray:
    out = (words[:, :size] >> np.uint32(8)).astype(np.float32)
    out *= np.float32(2.0**-23)
    out -= np.float32(1.0)
    out *= np.float32(bound)
    return out


def _normal(words: np.ndarray, size: int, std: float) -> np.ndarray:
    # why: Box-Muller in float64, rounded once, so that a processor's own sin and log hardly show.
    half = -(-size // 2)
    unit = (words[:, : 2 * half].astype(np.float64) + 0.5) * 2.0**-32
    radius = np.sqrt(-2.0 * np.log(unit[:, :half]))
    angle = 2.0 * math.pi * unit[:, half:]
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return (both[:, :size] * std).astype(np.float32)


class _Stream:
    """Rows of random numbers with an address: Philox in counter mode, keyed by (seed, name)."""

    def __init__(self, seed: int, name: str, draw: _Draw, scale: float) -> None:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
        self.key = np.frombuffer(digest, dtype=np.uint64)
        self.draw, self.scale = draw, scale

    def rows(self, start: int, stop: int, size: int) -> np.ndarray:
        """Rows start..stop of `size` values each: (stop - start, size) float32."""
        # why: whole counter blocks (8 words of 32 bit) a row, so that any row can be
        # reached by itself.
        blocks = -(-size // 8)
        stream = np.random.Philox(key=self.key, counter=start * blocks)
        words = stream.random_raw((stop - start) * blocks * 4).view(np.uint32)
        return self.draw(words.reshape(stop - start, blocks * 8), size, self.scale)
