"""Sizes, overrides and the messages for configs that cannot be."""

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from pretrain.models.build import ModelConfig
from pretrain.models.dit import DIT_MOE_SIZES, DIT_SIZES, DiTConfig, DiTMoEConfig
from pretrain.models.moe import MoEConfig
from pretrain.models.udit import UDiTConfig

read = TypeAdapter(ModelConfig).validate_python


def refusal(**values: object) -> str:
    with pytest.raises(ValidationError) as caught:
        read(values)
    return str(caught.value)


def test_size_alone_makes_a_model_and_only_size_need_change() -> None:
    for size in DIT_SIZES:
        assert f"{read({'family': 'dit', 'size': size}).patch}" == size[-1]
    assert len(DIT_MOE_SIZES) == 30
    assert read({"family": "dit-moe", "size": "S/2-16E2A"}).moe.experts == 16
    assert read({"family": "udit", "size": "L"}).width == 384


def test_explicit_fields_win_over_the_size() -> None:
    made = read({"family": "dit", "size": "S/2", "depth": 3, "head_dim": 32})
    assert (made.depth, made.width, made.num_heads) == (3, 384, 12)
    made = read({"family": "udit", "size": "S", "head_dim": 32, "depth": [1, 1, 1, 1, 1]})
    assert (made.num_heads, made.head_dim, made.depth) == (None, 32, (1, 1, 1, 1, 1))
    assert [made.stage_heads(s) for s in ("enc1", "enc2", "latent", "dec1")] == [3, 6, 12, 6]


def test_dit_moe_starts_from_the_published_form() -> None:
    moe = read({"family": "dit-moe", "size": "S/2-8E2A", "moe": {"top_k": 1}}).moe
    assert (moe.experts, moe.top_k, moe.score, moe.renormalise) == (8, 1, "softmax", False)
    assert (moe.hidden_ratio, moe.shared_ratio, moe.aux_batch) == (4.0, 2.0, 0.01)
    assert (moe.router_input, moe.router_time, moe.balance) == ("modulated", False, "none")
    assert DiTMoEConfig(size="B/2-8E2A", moe=MoEConfig(experts=4)).moe.hidden_ratio == 4.0
    assert not read({"family": "dit-moe", "size": "L/4-8E2A"}).qk_norm
    assert read({"family": "dit-moe", "size": "G/2-16E2A"}).qk_norm


@pytest.mark.parametrize(
    "cfg",
    [
        DiTConfig(size="XL/2", head_dim=64),
        DiTMoEConfig(size="XL/2-8E2A"),
        UDiTConfig(size="S", head_dim=32, moe={"experts": 4}),
    ],
)
def test_a_resolved_config_reads_back_as_itself(cfg: BaseModel) -> None:
    assert read(cfg.model_dump(mode="json")) == cfg
    assert hash(cfg) == hash(read(cfg.model_dump(mode="json")))


def test_refusals_say_what_came_and_what_to_change() -> None:
    assert "use one of S/2, S/4" in refusal(family="dit", size="M/2")
    assert "S/2-8E2A" in refusal(family="dit-moe", size="S/2")
    assert "use one of S, B, L" in refusal(family="udit", size="XL")
    assert "neither size nor depth, width, num_heads, patch given" in refusal(family="dit")
    assert "neither size nor width given" in refusal(family="udit")
    assert "Extra inputs are not permitted" in refusal(family="dit", siez="S/2")
    assert "must be a multiple of 2 (patch)" in refusal(family="dit", size="S/2", input_size=31)
    assert "input_size=20 must be a multiple of 8 (two halvings and a phase grid)" in refusal(
        family="udit", size="S", input_size=20
    )
    assert "give exactly one" in refusal(family="udit", size="S", num_heads=4, head_dim=24)
    assert "give exactly one" in refusal(family="udit", width=96)
    assert "head_dim" in refusal(family="udit", width=96, num_heads=32)
    assert "multiple of 50 (head_dim)" in refusal(family="dit", size="S/2", head_dim=50)
    assert "lower top_k" in refusal(family="udit", size="S", moe={"experts": 2, "top_k": 4})
    assert "width" in refusal(family="dit", size="S/2", width="wide")
