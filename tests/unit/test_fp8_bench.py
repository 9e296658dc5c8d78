"""The benchmark of precision: a row a recipe, and said to be an emulation where it is one."""

import math

from pydantic import TypeAdapter

from pretrain.benches.precision import precision
from pretrain.models.build import ModelConfig
from tests import tiny


def test_each_recipe_has_a_gain_and_a_gap() -> None:
    shape = {"input_size": 8, "in_channels": 16, "num_classes": 10, "learn_sigma": False}
    cfg = TypeAdapter(ModelConfig).validate_python(tiny.MODELS["dit-moe"] | shape)
    found = precision(cfg, images=4, steps=6, rounds=1)
    assert found["bench"] == "precision"
    assert (found["backend"], found["emulation"]) == ("emulated", True)
    assert [row["recipe"] for row in found["recipes"]] == ["delayed", "current", "block"]
    for row in found["recipes"]:
        assert row["gain"] > 0
        assert math.isclose(row["gain"], row["bf16_seconds"] / row["fp8_seconds"])
        assert 0 < abs(row["gap"]) < 0.05
