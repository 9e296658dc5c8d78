"""Power-function averages against a sum over every update, in float64."""

import numpy as np
import pytest
import torch

from pretrain import averaging

UPDATES = 400


def weights(updates: int, sigma: float) -> np.ndarray:
    """Weight of each of UPDATES updates in the average after `updates`, by running it."""
    held, exponent = np.zeros(UPDATES), averaging.gamma(sigma)
    for t in range(1, updates + 1):
        kept = averaging.beta(torch.tensor(float(t), dtype=torch.float64), exponent).item()
        held *= kept
        held[t - 1] += 1.0 - kept
    return held


@pytest.mark.parametrize(("sigma", "known"), [(0.05, 16.97), (0.10, 6.94), (0.25, 0.72)])
def test_gamma_has_the_standard_deviation_asked_for(sigma: float, known: float) -> None:
    exponent = averaging.gamma(sigma)
    assert exponent == pytest.approx(known, abs=0.01)
    s = (np.arange(1_000_000) + 0.5) / 1_000_000
    p = averaging.profile(s, 1.0, exponent) / len(s)
    mean = (p * s).sum()
    assert p.sum() == pytest.approx(1.0, abs=1e-6)
    assert (p * (s - mean) ** 2).sum() ** 0.5 == pytest.approx(sigma, rel=1e-5)


@pytest.mark.parametrize("sigma", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_a_width_out_of_range_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match=r"expected more than 0 and less than 0.2887"):
        averaging.gamma(sigma)


@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.28])
def test_an_update_weighs_the_integral_of_the_profile_over_it(sigma: float) -> None:
    exponent = averaging.gamma(sigma)
    ends = (np.arange(UPDATES + 1) / UPDATES) ** (exponent + 1)
    np.testing.assert_allclose(weights(UPDATES, sigma), np.diff(ends), rtol=1e-9, atol=1e-15)
    assert weights(1, sigma)[0] == 1.0  # the first copies


@pytest.mark.parametrize(
    ("a", "b"),
    [((100, 5.0), (300, 2.0)), ((300, 5.0), (100, 2.0)), ((200, 3.0), (200, 9.0))],
)
def test_inner_products_are_integrals(a: tuple[float, float], b: tuple[float, float]) -> None:
    end, parts = min(a[0], b[0]), 1_000_000
    s = (np.arange(parts) + 0.5) * end / parts
    wanted = (averaging.profile(s, *a) * averaging.profile(s, *b)).sum() * end / parts
    assert averaging.inner(a, b) == averaging.inner(b, a) == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize("sigma", [0.03, 0.05, 0.075, 0.12, 0.2])
def test_any_length_is_rebuilt_from_two_saved_now_and_then(sigma: float) -> None:
    """Of a random walk, which unlike a smooth path shows every weight that is wrong."""
    walk = np.random.default_rng(0).standard_normal((UPDATES, 200)).cumsum(0)
    saved = [(t, s) for t in range(25, UPDATES + 1, 25) for s in (0.05, 0.1)]
    factors = averaging.coefficients(saved, (UPDATES, sigma))
    rebuilt = sum(c * (weights(*s) @ walk) for c, s in zip(factors, saved, strict=True))
    wanted = weights(UPDATES, sigma) @ walk
    last = np.linalg.norm(walk[-1] - wanted)
    # the narrowest lies outside of what was saved
    assert np.linalg.norm(rebuilt - wanted) < (0.02 if sigma < 0.05 else 0.01) * last
    assert sum(factors) == pytest.approx(1.0, abs=5e-3)


def test_a_saved_average_is_rebuilt_as_it_is() -> None:
    saved = [(100, 0.05), (200, 0.05), (200, 0.1)]
    np.testing.assert_allclose(averaging.coefficients(saved, (200, 0.05)), [0, 1, 0], atol=1e-9)
    assert averaging.coefficients([(7, 0.1)], (7, 0.1)) == pytest.approx([1.0])


def test_factors_are_those_of_least_squares_over_every_update() -> None:
    saved = [(200, 0.05), (300, 0.05), (400, 0.05), (400, 0.1)]
    columns = np.stack([weights(*s) for s in saved], axis=1)
    wanted = np.linalg.lstsq(columns, weights(350, 0.08), rcond=None)[0]
    np.testing.assert_allclose(averaging.coefficients(saved, (350, 0.08)), wanted, atol=0.02)


@pytest.mark.parametrize(
    ("saved", "target", "message"),
    [
        ([], (10, 0.1), "no saved average"),
        ([(0, 0.1)], (10, 0.1), "after 0 updates"),
        ([(9, 0.1)], (10, 0.1), "end at 9"),
        ([(10, 0.3)], (10, 0.1), "0.3 came"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(
    saved: list[tuple[int, float]], target: tuple[int, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        averaging.coefficients(saved, target)
