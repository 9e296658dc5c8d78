"""The coordinate check: both verdicts on small families, what it finds, what it refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from typer.testing import CliRunner

from pretrain import cli, coordinates
from pretrain.config import ConfigError
from pretrain.coordinates import (
    LIMIT,
    CheckConfig,
    CoordinateError,
    Size,
    Verdict,
    check,
    fit,
    judge,
)
from pretrain.models.attention import Attention
from pretrain.models.build import ModelConfig, build
from pretrain.models.layers import ChannelAffineNorm
from pretrain.models.moe import MoE
from pretrain.models.mup import MupError, at_width
from pretrain.models.rep import Kernels
from pretrain.objectives import Flow
from pretrain.optim import OptimConfig
from pretrain.run import RunError
from tests import tiny

SHAPE = {"input_size": 8, "in_channels": 4, "num_classes": 10, "learn_sigma": False}
DIT = {"family": "dit", "depth": 2, "width": 64, "head_dim": 16, "patch": 2}
UDIT_MOE = {
    "family": "udit",
    "depth": [1, 1, 1, 1, 1],
    "width": 64,
    "head_dim": 8,
    # why: one number an image and few of them; LOG.md has it at widths that show its slope.
    "moe": {"experts": 8, "hidden_ratio": 0.5, "router_time": False},
    # why: after one step the readout has learnt one direction of the 9·channels inputs of a pixel,
    # which at these widths stands out of the sum of all only if they are few.
    "in_channels": 1,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def family(tree: dict[str, Any], widths: tuple[int, ...], *, mup: bool) -> dict[int, Any]:
    tree = SHAPE | tree | ({"mup": {"base_width": 64}} if mup else {})
    cfg = TypeAdapter(ModelConfig).validate_python(tree)
    return {width: at_width(cfg, width) for width in widths}


def verdicts(members: dict[int, Any], **changes: Any) -> dict[str, Verdict]:
    how = CheckConfig(Flow(), OptimConfig(lr=1e-3), clip=1.0, batch=4, steps=4, seeds=1)
    _, found = check(members, replace(how, **changes), lambda _: None)
    return {verdict.layer: verdict for verdict in found}


def failing(found: dict[str, Verdict]) -> set[str]:
    return {layer for layer, verdict in found.items() if not verdict.passes}


def test_dit_knows_no_width_under_mup_and_does_in_the_standard_parametrisation() -> None:
    widths = (32, 64, 128, 256)
    assert not failing(verdicts(family(DIT, widths, mup=True), seeds=2))
    found = verdicts(family(DIT, widths, mup=False))
    assert {"embedding", "time", "adaLN", "prediction"} <= failing(found)


def test_udit_moe_knows_no_width_under_mup_and_does_in_the_standard_parametrisation() -> None:
    widths = (32, 128)
    assert not failing(verdicts(family(UDIT_MOE, widths, mup=True), batch=8, seeds=2))
    found = verdicts(family(UDIT_MOE, widths, mup=False), batch=2)
    # The start: kernels whose fan holds the width; the updates: rates that do not shrink with it.
    assert {"attention depthwise", "shared expert depthwise", "embedding"} <= failing(found)
    assert {"adaLN", "prediction"} <= failing(found)


def test_dit_knows_no_depth_with_a_base_depth() -> None:
    def members(mup: dict[str, Any]) -> dict[int, Any]:
        tree = DIT | SHAPE | {"mup": {"base_width": 64} | mup}
        read = TypeAdapter(ModelConfig).validate_python
        return {depth: read(tree | {"depth": depth}) for depth in (2, 4, 16)}

    assert not failing(verdicts(members({"base_depth": 2}), seeds=2))
    assert "residual stream" in failing(verdicts(members({})))


def test_a_rate_that_does_not_follow_the_width_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = coordinates.factors
    monkeypatch.setattr(coordinates, "factors", lambda cfg: dict.fromkeys(real(cfg), (1.0, 1.0)))
    found = verdicts(family(DIT, (32, 256), mup=True), optim=OptimConfig(lr=4e-3))
    starts = [v.init for v in found.values() if v.init is not None]
    assert len(starts) == len(found) - 1
    assert max(map(abs, starts)) < LIMIT, "the starts are those of muP"
    assert {"attention output", "feed-forward out", "residual stream"} <= failing(found)
    moved = {layer for layer, v in found.items() if (v.moved or 0) > 2 * LIMIT}
    assert {"q", "k", "v", "attention output", "feed-forward in"} <= moved


def test_a_rate_that_shrinks_where_it_must_not_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start hides it: only how far training has moved them tells."""

    def shrinking(cfg: Any) -> dict[str, tuple[float, float]]:
        return {name: (64 / cfg.width, decay) for name, (_, decay) in real(cfg).items()}

    real = coordinates.factors
    monkeypatch.setattr(coordinates, "factors", shrinking)
    found = verdicts(family(DIT, (32, 256), mup=True))
    for layer in ("embedding", "time in", "label"):
        assert abs(found[layer].last or 1) <= LIMIT
        assert (found[layer].moved or 0) < -0.5
    assert {"embedding", "time in", "label"} <= failing(found)


FLAT, NONE, GROWS = [1.0, 1.05, 0.98], [0.0, 0.0, 0.0], [1.0, 2.0, 4.0]


def rows(
    init: list[float], first: list[float], last: list[float], moved: list[float] = FLAT
) -> list[Size]:
    values = zip((16, 32, 64), init, first, last, moved, strict=True)
    return [Size("x", at, 0, *sizes) for at, *sizes in values]


@pytest.mark.parametrize(
    ("sizes", "passes"),
    [
        (rows(FLAT, FLAT, FLAT), True),
        (rows(GROWS, FLAT, FLAT), False),
        (rows(FLAT, FLAT, GROWS[::-1]), False),
        (rows(NONE, FLAT, FLAT), True),
        (rows(NONE, GROWS, FLAT), False),
        (rows(NONE, NONE, FLAT), True),
        (rows(NONE, NONE, GROWS), False),
        (rows(NONE, NONE, NONE), False),  # it never moves
        (rows([0.0, 1.0, 1.0], FLAT, FLAT), False),
        (rows(FLAT, FLAT, FLAT, [1.0, 1.1, 1.25]), True),
        (rows(FLAT, FLAT, FLAT, [1.0, 1.2, 1.4]), False),
        (rows(FLAT, FLAT, [1.0, math.inf, 1.0]), False),
        (rows(FLAT, FLAT, [1.0, math.nan, 1.0]), False),
    ],
)
def test_what_is_judged(sizes: list[Size], passes: bool) -> None:
    assert judge(sizes)[0].passes is passes


def test_a_slope_and_its_error_are_those_of_least_squares() -> None:
    assert fit([(8, 3.0), (16, 3.0 * 2**0.5), (32, 6.0)]) == pytest.approx((0.5, 0.0), abs=1e-12)
    # log2 sizes 0, 1, 0 over -1, 0, 1: slope 0, residuals -1/3, 2/3, -1/3, one degree of freedom
    assert fit([(1, 1.0), (2, 2.0), (4, 1.0)]) == pytest.approx((0.0, math.sqrt(2 / 3 / 2)))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_layer_with_parameters_is_watched(name: str) -> None:
    tree = tiny.MODELS[name] | SHAPE
    tree |= {"qk_norm": True} if name == "dit-moe" else {"adaln_lora": 4} if "udit" in name else {}
    with torch.device("meta"):
        model = build(TypeAdapter(ModelConfig).validate_python(tree))
    watched = {id(module) for _, module, _ in coordinates._layers(model)}
    # Kernels are watched as their sum, experts as what the dispatcher gives, q and k before norms.
    inside = [m for m in model.modules() if isinstance(m, Kernels | MoE)]
    watched |= {id(part) for whole in inside for part in whole.children() if part is not None}
    apart = (Attention, ChannelAffineNorm, nn.Identity)  # Attention itself holds logit_scale alone
    missed = [
        prefix
        for prefix, module in model.named_modules()
        if module._parameters and id(module) not in watched and not isinstance(module, apart)
    ]
    assert not missed


def command(folder: Path, *words: str, model: str = "dit+mup") -> Any:
    path = tiny.write(folder, model, folder / "no data")
    return CliRunner().invoke(cli.app, ["coord-check", str(path), *words])


def test_the_command_says_draws_and_writes_what_it_found(tmp_path: Path) -> None:
    words = ("--widths", "1x,4x", "--seeds", "1", "--steps", "2")
    result = command(tmp_path, *words, "parametrisation=standard")
    assert result.exit_code == 1
    folder = tmp_path / "run" / "coord-check"
    assert (folder / "standard-width.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "standard-width.json").read_text())
    assert report["passes"] is False
    assert report["widths"] == [32, 128]
    assert {row["at"] for row in report["sizes"]} == {32, 128}
    assert report["config"]["parametrisation"] == "standard"
    assert {"commit", "versions", "lr", "batch"} <= set(report)
    assert "predicti" in result.stdout  # the last digits of the numbers leave it more room or less


def test_the_command_ends_well_where_the_check_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinates, "LIMIT", 9.0)  # one seed scatters
    monkeypatch.setattr(coordinates, "MOVED", 9.0)
    monkeypatch.setattr(coordinates, "draw_sizes", lambda *_: None)
    words = ("--widths", "32,128", "--seeds", "1", "--steps", "2", "--json")
    result = command(tmp_path, *words, "--out", str(tmp_path / "there"))
    report = json.loads(result.stdout)
    assert (result.exit_code, report["passes"]) == (0, True)
    assert report == json.loads((tmp_path / "there" / "mup-width.json").read_text())


def test_depths_are_another_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinates, "draw_sizes", lambda *_: None)
    result = command(tmp_path, "--depths", "1,3", "--seeds", "1", "--steps", "2", "--json")
    report = json.loads(result.stdout)
    assert report["depths"] == [1, 3]
    assert {row["at"] for row in report["sizes"]} == {1, 3}


@pytest.mark.parametrize(
    ("words", "error", "why"),
    [
        (["--widths", "1x,wide"], ConfigError, "'wide' is no whole number above 0"),
        (["--widths", "1x,0x"], ConfigError, "'0x' is no whole number above 0"),
        (["--widths", "1x,inf"], ConfigError, "'inf' is no whole number above 0"),
        (["--widths", "32,64.5"], ConfigError, "'64.5' is no whole number above 0"),
        (["--widths", "1x,2x", "--lr", "0"], ConfigError, "lr"),
        (["--widths", "1x,2x", "--out", "/dev/null"], RunError, "is no directory"),
        (["--widths", "1x"], CoordinateError, "at least two different ones"),
        (["--widths", "32,33"], MupError, "33 is no width of this model's family"),
        ([], ConfigError, "give one of the two"),
        (["--widths", "1x,2x", "--depths", "2,4"], ConfigError, "give one of the two"),
    ],
)
def test_wrong_words_are_refused(
    tmp_path: Path, words: list[str], error: type[ValueError], why: str
) -> None:
    result = command(tmp_path, *words)
    assert isinstance(result.exception, error)
    assert why in str(result.exception)


def test_a_udit_has_no_depths(tmp_path: Path) -> None:
    result = command(tmp_path, "--depths", "2,4", model="udit")
    assert isinstance(result.exception, ConfigError)
    assert "is that of its family" in str(result.exception)
