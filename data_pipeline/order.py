"""The order of samples as arithmetic: position -> sample id, O(1) state, any position at once.

Not a sampler: it holds no iterator and knows no rank. Two kinds: "chunks" reads each lane mostly
in sequence, "samples" is one permutation over all. Both are the endless concatenation of epochs.

    ids = Order(count=60_000, lanes=1024, seed=0).samples(np.arange(256))
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

CHUNK = 64  # consecutive samples of a lane that stay together
WINDOW = 4  # chunks shuffled into each other
ROUNDS = 6  # Feistel half-rounds; even, so both halves get the same number

U64 = np.uint64
Keys = np.ndarray  # uint64, at least one-dimensional (numpy warns when a scalar wraps around)


def _mix(z: Keys) -> Keys:
    """A bijection of 64-bit words with full avalanche. Source: Steele et al. 2014, splitmix64."""
    z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
    return z ^ (z >> U64(31))


def key(*parts: int | np.ndarray) -> Keys:
    """A 64-bit key from integers and integer arrays (broadcast together); order matters."""
    word = np.zeros(1, U64)
    for part in parts:
        if isinstance(part, int):
            part = np.array([part & 0xFFFF_FFFF_FFFF_FFFF], U64)
        word = _mix((word + U64(0x9E3779B97F4A7C15)) ^ part.astype(U64))
    return word


def _feistel(x: np.ndarray, a: np.ndarray, b: np.ndarray, keys: Keys) -> np.ndarray:
    """A keyed bijection of 0..a*b-1, elementwise. Source: Black and Rogaway 2002, Sec. 5."""
    left, right = x % a, x // a
    for i in range(ROUNDS):
        salt = keys + U64((i + 1) * 0xD1342543DE82EF95 & 0xFFFF_FFFF_FFFF_FFFF)
        # why: 32 bits of the hash, because a sum that wraps at 2^64 is no bijection modulo a
        if i % 2 == 0:
            left = (left + (_mix(salt ^ right) >> U64(32))) % a
        else:
            right = (right + (_mix(salt ^ left) >> U64(32))) % b
    return left + right * a


def permute(x: np.ndarray, size: int | np.ndarray, keys: Keys) -> np.ndarray:
    """Where a keyed permutation of 0..size-1 sends x, elementwise.

    x, size and keys are broadcast together; 0 <= x < size <= 2^53. Returns uint64.
    """
    x, size, keys = np.broadcast_arrays(
        np.atleast_1d(x).astype(U64), np.asarray(size).astype(U64), keys
    )
    a = np.ceil(np.sqrt(size.astype(np.float64))).astype(U64)
    b = (size + a - U64(1)) // a
    y = _feistel(x, a, b, keys)
    # Cycle walking: the square is at most sqrt(size) larger than the domain, so this is rare.
    outside = y >= size
    while outside.any():
        y[outside] = _feistel(y[outside], a[outside], b[outside], keys[outside])
        outside = y >= size
    return y


@dataclass(frozen=True)
class Order:
    """The endless order of `count` samples stored in `lanes` contiguous ranges."""

    count: int  # samples in an epoch
    lanes: int  # contiguous ranges read side by side
    seed: int
    kind: Literal["chunks", "samples"] = "chunks"

    def __post_init__(self) -> None:
        assert self.count > 0, f"an order over {self.count} samples"
        assert self.lanes > 0, f"an order with {self.lanes} lanes"

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Sample ids at absolute positions, any shape, int64; positions may straddle epochs."""
        flat = np.asarray(positions, np.int64).reshape(-1).astype(U64)
        epoch, i = flat // U64(self.count), flat % U64(self.count)
        if self.kind == "samples":
            ids = permute(i, self.count, key(self.seed, epoch, 0))
        else:
            ids = self._chunks(epoch, i)
        return ids.astype(np.int64).reshape(np.shape(positions))

    def _chunks(self, epoch: np.ndarray, i: np.ndarray) -> np.ndarray:
        """Position i of an epoch -> its lane (round robin) -> the place in that lane."""
        base, rest = divmod(self.count, self.lanes)  # the first `rest` lanes hold one sample more
        turn = i // U64(self.lanes)
        width = np.where(turn < U64(base), U64(self.lanes), U64(rest))
        lane = permute(i % U64(self.lanes), width, key(self.seed, epoch, 1, width))
        length = U64(base) + (lane < U64(rest)).astype(U64)
        start = lane * U64(base) + np.minimum(lane, U64(rest))
        return start + _place(turn, length, key(self.seed, epoch, 2, lane))


def _place(turn: np.ndarray, length: np.ndarray, keys: Keys) -> np.ndarray:
    """The turn-th sample to read of a lane of `length`: shuffled chunks, then shuffled windows."""
    span = U64(CHUNK * WINDOW)
    window = turn // span
    inside = np.minimum(span, length - window * span)
    q = window * span + permute(turn % span, inside, key(keys, 3, window))
    # The short chunk stands before full chunk number `gap`; the full ones are permuted among them.
    full, tail = length // U64(CHUNK), length % U64(CHUNK)
    gap = key(keys, 4) % (full + U64(1)) * U64(CHUNK)
    in_tail = (q >= gap) & (q < gap + tail)
    q_full = np.where(in_tail, U64(0), np.where(q < gap, q, q - tail))
    # A lane shorter than one chunk has no full chunk: its elements are all in the tail.
    chunk = permute(q_full // U64(CHUNK), np.maximum(full, U64(1)), key(keys, 5))
    return np.where(in_tail, full * U64(CHUNK) + q - gap, chunk * U64(CHUNK) + q_full % U64(CHUNK))
