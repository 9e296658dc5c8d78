"""Power-function averages of weights: how they move, and how one is rebuilt from others.

An average of relative standard deviation σ weighs the weights after update s by s^γ. Saved now and
then, a few of them span averages of every length: `coefficients` finds the mixture closest to a
wanted one. Arithmetic only; it knows no model. Updates are those an optimizer made, t = 1, 2, …

Source: Karras et al. 2024 (EDM2), Sec. 3.1 and App. C; derived here from the profile.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

WIDEST = 12**-0.5  # σ of γ = 0, the plain mean of all updates; γ < 0 would favour the oldest


def gamma(sigma: float) -> float:
    """The exponent γ of a profile whose standard deviation is σ times its length.

    The largest root of σ² (γ+2)² (γ+3) = γ+1. Raises ValueError unless 0 < σ < WIDEST.
    """
    if not 0.0 < sigma < WIDEST:
        raise ValueError(
            f"a relative standard deviation of {sigma:g} came; expected more than 0 and less than "
            f"{WIDEST:.4f}, which is the plain mean"
        )
    inverse = sigma**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def beta(t: Tensor, exponent: float) -> Tensor:
    """Share of the old average kept by update t, counted from 1: (1 − 1/t)^(γ+1), 0 for t = 1.

    Then update s weighs ∫ p over [s−1, s], exactly, in the average after t.
    """
    return (1.0 - 1.0 / t) ** (exponent + 1.0)


def profile(s: np.ndarray, t: float, exponent: float) -> np.ndarray:
    """Density p of an average after update t at s in [0, t]: (γ+1) s^γ / t^(γ+1)."""
    return (exponent + 1.0) / t * (s / t) ** exponent


def inner(a: tuple[float, float], b: tuple[float, float]) -> float:
    """∫ p_a p_b of two profiles (t, γ), in closed form."""
    (early, low), (late, high) = sorted((a, b))
    # with r = early/late: (γa+1)(γb+1) r^(γ of the later) / ((γa+γb+1) · late)
    return (low + 1) * (high + 1) * (early / late) ** high / ((low + high + 1) * late)


def coefficients(snapshots: Sequence[tuple[int, float]], target: tuple[int, float]) -> list[float]:
    """Factors of saved averages whose sum is closest to the average `target`, in least squares.

    snapshots, target: (updates, σ); updates are those the optimizer made, steps left out not
    counted. Raises ValueError for no snapshot, for fewer than one update, for a σ out of range, and
    for a target later than every snapshot.
    """
    if not snapshots:
        raise ValueError("no saved average came; give at least one")
    if min(t for t, _ in (*snapshots, target)) < 1:
        raise ValueError("an average after 0 updates came; expected at least 1")
    if target[0] > max(t for t, _ in snapshots):
        raise ValueError(
            f"an average after {target[0]} updates was asked for, the saved ones end at "
            f"{max(t for t, _ in snapshots)}; ask for an earlier one"
        )
    known = [(float(t), gamma(sigma)) for t, sigma in snapshots]
    wanted = (float(target[0]), gamma(target[1]))
    # why: profiles of unit length, or early snapshots would drown the late ones in rounding.
    norms = np.array([inner(p, p) ** 0.5 for p in known])
    overlaps = np.array([[inner(p, q) for q in known] for p in known]) / np.outer(norms, norms)
    right = np.array([inner(p, wanted) for p in known]) / norms
    solution = np.linalg.lstsq(overlaps, right, rcond=None)[0]
    return [float(x) for x in solution / norms]
