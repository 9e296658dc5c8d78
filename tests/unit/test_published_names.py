"""Published layouts: state dicts written out by hand come in, compute the same, and go out again
byte for byte."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from pretrain.layouts import official, rules
from pretrain.layouts.rules import Layout, WeightsError
from pretrain.models.build import ModelConfig, build
from pretrain.models.init import initialise
from tests import published

read_config = TypeAdapter(ModelConfig).validate_python
SMALL = {"depth": 2, "width": 32, "patch": 2, "input_size": 8, "num_classes": 5}
CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "dit": (
        {"family": "dit", "num_heads": 2, **SMALL},
        published.dit_keys(2, 32, 2, 4, 5),
    ),
    "dit-moe": (
        {"family": "dit-moe", "num_heads": 2, "moe": {"experts": 3}, **SMALL},
        published.dit_keys(2, 32, 2, 4, 5, experts=3),
    ),
    "dit-moe, normed": (
        {"family": "dit-moe", "num_heads": 2, "qk_norm": True, "moe": {"experts": 3}, **SMALL},
        published.dit_keys(2, 32, 2, 4, 5, experts=3, norm=16),
    ),
    "udit": (
        {"family": "udit", "width": 16, "num_heads": 2, "depth": [1, 2, 1, 1, 1]}
        | {"input_size": 16, "num_classes": 5},
        published.udit_keys([1, 2, 1, 1, 1], 16, 2, 5),
    ),
}
# Under muP the last weight of a file holds what our model multiplies its input by, here 1/4.
CASES |= {
    f"{name}, muP": (
        values | {"mup": {"base_width": values["width"] // 2, "output_mult": 0.5}},
        keys,
    )
    for name, (values, keys) in CASES.items()
    if name in ("dit", "udit")
}


def read(layout: Layout, state: published.State) -> published.State:
    found: published.State = {}
    for rule in layout:
        tensors = rule.read([state[key] for key in rule.theirs])
        found |= dict(zip(rule.ours, tensors, strict=True))
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_published_state_dict_comes_back_byte_for_byte(case: str) -> None:
    values, keys = CASES[case]
    cfg = read_config(values)
    layout, other = official.layout_of(cfg)
    shapes, _ = official.shapes_of(cfg)
    assert not other
    assert rules.keys(layout, shapes) == keys
    state = published.state(keys)
    ours = read(layout, state)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == shapes
    back: published.State = {}
    for rule in layout:
        tensors = rule.write([ours[name] for name in rule.ours])
        back |= dict(zip(rule.theirs, tensors, strict=True))
    for key, tensor in state.items():
        if key != "pos_embed":
            assert torch.equal(back[key].view(torch.int32), tensor.view(torch.int32)), key
    torch.testing.assert_close(back.get("pos_embed"), state.get("pos_embed"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_an_imported_model_computes_what_its_publication_says(case: str) -> None:
    values, keys = CASES[case]
    cfg = read_config(values)
    model = build(cfg)
    initialise(model, 0)
    state = published.state(keys)
    layout, _ = official.layout_of(cfg)
    model.load_state_dict(read(layout, state))
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, cfg.input_size, cfg.input_size, generator=draw)
    t, y = torch.tensor([0, 1, 250, 500, 998, 999]), torch.arange(6)
    forward = published.udit if cfg.family == "udit" else published.dit
    with torch.no_grad():
        ours, theirs = model.eval()(x, t, y), forward(state, x, t, y, 2)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ({"family": "dit", "size": "S/2"}, 32_963_360),
        ({"family": "dit", "size": "XL/2"}, 675_129_632),
        ({"family": "dit-moe", "size": "S/2-8E2A"}, None),
        ({"family": "dit-moe", "size": "G/2-16E2A"}, None),
        ({"family": "udit", "size": "S"}, 58_896_568),
        ({"family": "udit", "size": "B"}, 231_251_304),
        ({"family": "udit", "size": "L"}, 916_335_304),
    ],
)
def test_a_published_size_is_told_by_its_shapes(
    values: dict[str, Any], numbers: int | None
) -> None:
    cfg = read_config(values)
    layout, _ = official.layout_of(cfg)
    shapes, _ = official.shapes_of(cfg)
    ours = [name for rule in layout for name in rule.ours]
    assert sorted(ours) == sorted(shapes), "each tensor in one rule"
    keys = rules.keys(layout, shapes)
    assert numbers in (None, sum(torch.Size(shape).numel() for shape in keys.values()))
    guess = official.infer(cfg.family, keys, "a file")
    assert official.published_size(guess) == cfg.size
    assert read_config(guess.values | {"size": cfg.size}) == cfg


def test_heads_that_no_tensor_tells_are_guessed_in_the_stated_order() -> None:
    def heads(width: int, depth: int) -> int | None:
        keys = published.dit_keys(depth, width, 2, 2, 3)
        return official.infer("dit", keys, "a file").values.get("num_heads")

    assert heads(1152, 28) == 16  # as XL/2
    assert heads(1152, 2) == 18  # of 64 channels
    assert heads(72, 2) == 1  # of 72
    assert heads(100, 2) is None


def test_what_does_not_fit_is_listed_whole() -> None:
    keys = published.dit_keys(2, 32, 2, 4, 5)
    found = dict(keys) | {"head.weight": (3,), "head.bias": (3,), "t_embedder.mlp.0.bias": (31,)}
    for i in range(2):
        del found[f"blocks.{i}.mlp.fc2.weight"], found[f"blocks.{i}.mlp.fc2.bias"]
    with pytest.raises(WeightsError) as caught:
        rules.check(keys, found, "x.pt", "give --config")
    text = str(caught.value)
    assert "x.pt does not fit: 4 missing, 2 unexpected, 1 of another shape" in text
    assert all(
        f"missing: blocks.{i}.mlp.fc2.{p}" in text for i in (0, 1) for p in ("weight", "bias")
    )
    assert "unexpected: head.weight" in text
    assert "unexpected: head.bias" in text
    assert "t_embedder.mlp.0.bias: [31], expected [32]" in text
    with pytest.raises(WeightsError, match=r"y_embedder_1.embedding_table.weight: missing"):
        official.infer("udit", keys, "x.pt")


def test_another_position_table_is_refused() -> None:
    layout, _ = official.layout_of(read_config(CASES["dit"][0]))
    (rule,) = [rule for rule in layout if not rule.ours]
    table = published.state(CASES["dit"][1])["pos_embed"]
    assert rule.read([table]) == []
    assert rule.read([table.half()]) == []
    with pytest.raises(WeightsError, match="pos_embed is not the table"):
        rule.read([table + 2e-5])
    with pytest.raises(WeightsError, match="pos_embed is not the table"):
        rule.read([table * float("nan")])


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"family": "dit", "size": "S/2", "qk_norm": True}, "model.qk_norm=true"),
        ({"family": "dit", "size": "S/2", "sinusoid_shift": 1}, "model.sinusoid_shift=1"),
        (
            {"family": "dit-moe", "size": "S/2-8E2A", "moe": {"score": "sigmoid", "every": 2}},
            "model.moe.score=sigmoid, model.moe.every=2",
        ),
        ({"family": "udit", "size": "S", "moe": {"experts": 4}}, "model.moe"),
        ({"family": "udit", "size": "S", "adaln_lora": 8}, "model.adaln_lora=8"),
        (
            {"family": "dit", "size": "S/2", "mup": {"base_width": 64, "base_depth": 2}},
            "model.mup.base_depth",
        ),
    ],
)
def test_settings_that_nobody_published_have_no_published_layout(
    values: dict[str, Any], named: str
) -> None:
    layout, other = official.layout_of(read_config(values))
    assert (layout, ", ".join(other)) == ([], named)


def test_a_balance_bias_that_is_not_zero_has_no_place_in_the_published_form() -> None:
    rule = rules.unused("blocks.0.ffn.router.bias", 3)
    assert rule.write([torch.zeros(3)]) == []
    with pytest.raises(WeightsError, match=r"router.bias is not zero"):
        rule.write([torch.tensor([0.0, 1e-3, 0.0])])
