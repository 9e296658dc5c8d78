"""Mean and std per channel of latents seen in pieces, the same however the pieces were cut."""

from typing import Any

import numpy as np
from torch import Tensor, zeros

Sum = np.ndarray  # (2, C) float64: a sum, and what its rounding has lost


def _plus(total: Sum, value: np.ndarray) -> Sum:
    """Add (C,) values without loss. Source: Neumaier 1974, the improved Kahan-Babuska sum."""
    new = total[0] + value
    larger = np.abs(total[0]) >= np.abs(value)
    lost = np.where(larger, (total[0] - new) + value, (value - new) + total[0])
    return np.stack([new, total[1] + lost])


class Moments:
    """How many values a channel has had, their sum and the sum of their squares."""

    def __init__(self) -> None:
        self.values = 0
        self.total: Sum = np.zeros((2, 1))
        self.square: Sum = np.zeros((2, 1))

    def add(self, raw: Tensor, posterior: bool) -> None:
        """raw: (B, C, H, W), or (B, 2C, H, W) when it is mean and log-variance."""
        value = raw.double()
        spread = zeros(())
        if posterior:
            value, log_variance = value.chunk(2, 1)
            # why: the variance of a drawn latent is that of the means plus that of the draw
            spread = log_variance.exp().sum((0, 2, 3))
        self.values += value[:, 0].numel()
        self.total = _plus(self.total, value.sum((0, 2, 3)).numpy())
        self.square = _plus(self.square, (value.square().sum((0, 2, 3)) + spread).numpy())

    def join(self, values: int, total: list[list[float]], square: list[list[float]]) -> None:
        """Add what another process has seen, as its `plain` says."""
        self.values += values
        for row in range(2):
            self.total = _plus(self.total, np.array(total[row]))
            self.square = _plus(self.square, np.array(square[row]))

    def plain(self) -> dict[str, Any]:
        """Numbers and lists, ready for JSON, which keeps every bit of a float64."""
        return {
            "values": self.values,
            "total": self.total.tolist(),
            "square": self.square.tolist(),
        }

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std), each (C,); both empty when nothing was added."""
        if self.values == 0:
            return np.zeros(0), np.zeros(0)
        mean = self.total.sum(0) / self.values
        square = self.square.sum(0) / self.values
        variance = square - mean**2
        # why: what is left of a constant channel after the subtraction is rounding, not variance
        floor = 1e-12 * np.maximum(square, 1e-12)
        return mean, np.sqrt(np.where(variance > floor, variance, 0))
