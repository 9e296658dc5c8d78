"""Which steps are left out: not finite, or far above what loss and gradient norm have been.

Pure arithmetic on the device, equal on all ranks: nobody waits for the answer. What becomes of a
step that is left out, and of too many of them, is decided in `engine` and on the page.
"""

import math

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch import Tensor


class GuardConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    window: PositiveInt = 100  # steps that running mean and variance reach back
    after: PositiveInt = 50  # finite steps before the first is judged
    sigma: PositiveFloat | None = 6.0  # standard deviations above the mean; null: finite is enough
    factor: float = Field(2.0, ge=1.0)  # and at least so many times the mean
    max_skips: PositiveInt = 20  # skipped steps in a row before the last checkpoint is restored


class Guard:
    """Running mean and variance of ln(loss) and ln(gradient norm), and what is too far above.

    The logarithm: spikes multiply, and one rule then fits any scale of a loss.
    """

    def __init__(self, cfg: GuardConfig, device: torch.device) -> None:
        self._cfg = cfg
        # (2, 3): of loss and norm each mean, variance, and values taken in.
        self.statistics = torch.zeros(2, 3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def judge(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Whether a step is left out, (), and the limits of its values, (2,); takes them in.

        values: (2,), loss and gradient norm over all ranks, float64. A value above its limit is
        taken in as the limit, so that a lasting shift becomes the new normal; one that has no
        logarithm is not taken in. Source: West 1979 (weighted mean and variance in one pass).
        """
        cfg, logs = self._cfg, values.log()
        mean, variance, count = self.statistics.unbind(1)
        limit = torch.full_like(mean, math.inf)
        if cfg.sigma is not None:
            margin = (cfg.sigma * variance.sqrt()).clamp(min=math.log(cfg.factor))
            limit = torch.where(count >= cfg.after, mean + margin, limit)
        skip = (~torch.isfinite(values) | (logs > limit)).any()
        # why: a plain mean over the first window, which would else be weighted towards zero.
        weight = 1.0 / (count + 1.0).clamp(max=cfg.window)
        delta = torch.minimum(logs, limit) - mean
        moved = (1.0 - weight) * (variance + weight * delta.square())
        taken = torch.stack([mean + weight * delta, moved, count + 1.0], dim=1)
        known = torch.isfinite(logs)[:, None]
        self.statistics.copy_(torch.where(known, taken, self.statistics))
        return skip, limit.exp()

    def restart(self) -> None:
        """Forgets everything."""
        self.statistics.zero_()


def reasons(step: int, values: tuple[float, float], limits: tuple[float, float]) -> str:
    """Why a step was left out, in a sentence."""
    said = [
        f"{name} {value:.4g} is above {limit:.4g}"
        if math.isfinite(value)
        else f"{name} is not finite"
        for name, value, limit in zip(("loss", "gradient norm"), values, limits, strict=True)
        if not value < limit
    ]
    return f"step {step} is left out: {', '.join(said)}"
