"""Random numbers of the data path, addressed by (seed, position). Never by rank, worker or history.

Not the noise of diffusion: that belongs to the training program.
"""

import numpy as np

from data_pipeline.order import key

FLIP, POSTERIOR = 1, 2  # independent streams
BLOCK = 8  # float32 numbers in one Philox counter step (4 words of 64 bits)


def _stream(seed: int, purpose: int, counter: int) -> np.random.Generator:
    """Source: Salmon et al. 2011, Philox4x64; the counter is the address."""
    word = int(key(seed, purpose)[0])
    return np.random.Generator(np.random.Philox(key=word, counter=counter))


def flips(seed: int, start: int, count: int) -> np.ndarray:
    """Which stored orientation positions start … start+count-1 get: (count,) int64, 0 or 1."""
    # One counter step holds 4 words, so each position has a step of its own.
    words = _stream(seed, FLIP, start).integers(
        0, 2**64, (count, BLOCK // 2), dtype=np.uint64, endpoint=False
    )
    return (words[:, 0] >> np.uint64(63)).astype(np.int64)


def normals(seed: int, start: int, count: int, size: int) -> np.ndarray:
    """Standard normal rows of positions start … start+count-1: (count, size) float32.

    Why not the ziggurat: it takes a varying amount of the stream, so rows lose their address.
    Source: Box and Muller 1958.
    """
    half = -(-size // 2)
    steps = -(-2 * half // BLOCK)  # of the counter, a row
    stream = _stream(seed, POSTERIOR, start * steps)
    u = stream.random((count, steps * BLOCK), dtype=np.float32)
    radius = np.sqrt(np.float32(-2) * np.log1p(-u[:, :half]))
    angle = u[:, half : 2 * half] * np.float32(2 * np.pi)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)[:, :size]
