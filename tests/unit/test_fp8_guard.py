"""The guard of FP8: a scale that is broken falls back by name, and nobody else does."""

import json
import math
from pathlib import Path

import pytest

from pretrain.fp8_guard import standing_out, worst_first
from tests import ranks, tiny


def test_an_error_that_no_rounding_explains_stands_out() -> None:
    healthy = {f"p{i}": 0.03 + 0.002 * i for i in range(8)}
    assert standing_out(healthy) == []
    assert standing_out({}) == []
    assert standing_out(healthy | {"odd": 0.9}) == ["odd"]
    assert standing_out(healthy | {"odd": math.nan, "odder": math.inf}) == ["odd", "odder"]
    # where all are rough, as with e5m2 inputs, none of them is odd
    assert standing_out({f"p{i}": 0.3 for i in range(8)}) == []


def test_the_worst_fall_back_first_and_ever_more_at_once() -> None:
    errors = {f"p{i}": i / 100 for i in range(8)}
    assert list(worst_first(errors, ["p7"])) == [["p6"], ["p5", "p4"], ["p3", "p2", "p1", "p0"]]
    assert list(worst_first({}, [])) == []


BROKEN = "blocks.0.attn.q"


def broken(how: str, *words: str) -> None:
    """Trains; from the third step on a scale is wrong: of one product, or of its gradient."""
    from parallel.fp8.scaling import Scaling

    honest, seen = Scaling.loaded, [0]

    def loaded(self: Scaling) -> None:
        honest(self)
        seen[0] += 1
        if seen[0] >= 3 and how == "too large":
            self.products[BROKEN].past.mul_(2.0**20)
        if seen[0] >= 3 and how == "too small":
            self.products[BROKEN].past.mul_(2.0**-20)
        if seen[0] == 3 and how == "gradient":
            self.tensors()[f"fp8.{BROKEN}.history"][2].mul_(2.0**20)

    Scaling.loaded = loaded  # type: ignore[method-assign]
    ranks.pretrain(*words)


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "how", ["too large", "gradient", pytest.param("too small", marks=pytest.mark.slow)]
)
def test_a_broken_scale_falls_back_alone_and_the_gap_is_small_again(
    how: str, digits: Path, tmp_path: Path
) -> None:
    config = tiny.write(
        tmp_path, "dit", digits, steps=6, model__zero_init_std=0.05, precision="fp8"
    )
    run = tmp_path / "run"
    run.mkdir()
    words = ("train", str(config), f"run_dir={run}", "fp8.keep_first=0", "fp8.guard_every=4")
    ranks.run(broken, 1, how, *words, log=run / "ranks.log")
    assert [line["fp8.fallbacks"] for line in lines(run)] == [0, 0, 0, 0, 1, 1]
    assert lines(run)[-1]["fp8.gap"] < 1e-3
    log = (run / "log.txt").read_text()
    assert f"fp8, step 4: back to bf16: {BROKEN}: " in log
    assert "This is an emulation" in log


def all_broken(*words: str) -> None:
    """Trains; the scales of all products are too coarse alike, so that none stands out."""
    from parallel.fp8 import recipes

    honest = recipes.scale_of

    def scale_of(amax, fmt, margin=0):  # type: ignore[no-untyped-def]
        return honest(amax, fmt, margin) * 2.0**-13

    recipes.scale_of = scale_of
    ranks.pretrain(*words)


def test_if_none_stands_out_the_worst_fall_back_until_the_loss_is_near(
    digits: Path, tmp_path: Path
) -> None:
    config = tiny.write(tmp_path, "dit", digits, steps=3, model__zero_init_std=0.2, precision="fp8")
    run = tmp_path / "run"
    run.mkdir()
    limits = ("fp8.keep_first=0", "fp8.guard_every=2", "fp8.guard_limit=1e-4")
    words = ("train", str(config), f"run_dir={run}", *limits)
    ranks.run(all_broken, 1, *words, log=run / "ranks.log")
    assert lines(run)[0]["fp8.fallbacks"] == 0
    assert lines(run)[-1]["fp8.fallbacks"] > 0
    assert lines(run)[-1]["fp8.gap"] <= 1e-4
    assert "from bf16's, above 0.01%" in (run / "log.txt").read_text()
