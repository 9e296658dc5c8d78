"""Closed formulas beside the model itself: multiply-adds beside torch's counter, tensors beside
those that are built."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parallel import tensor
from parallel.kernels import gpu
from parallel.kernels.phases import attention
from pretrain import config
from pretrain.models.build import build
from pretrain.models.dit import DIT_SIZES, DiTConfig, DiTMoEConfig
from pretrain.models.families import build_form
from pretrain.models.moe import moe_layers
from pretrain.models.rep import Form
from pretrain.models.udit import UDIT_SIZES, UDiTConfig
from pretrain.planning import macs
from pretrain.planning.anatomy import anatomy
from pretrain.planning.parameters import counted, parameters

SHIPPED = sorted(Path("configs").glob("*.yaml"))
UDIT = {"width": 12, "num_heads": 3, "depth": (1, 1, 1, 1, 1), "input_size": 16, "num_classes": 10}
DIT = {"depth": 3, "width": 36, "num_heads": 3, "patch": 2, "input_size": 8, "num_classes": 10}
UNUSUAL = {  # what no shipped configuration has
    "low-rank adaLN, every second, expert choice": UDiTConfig(
        **UDIT,
        adaln_lora=3,
        moe={"experts": 6, "top_k": 2, "every": 2, "balance": "expert_choice", "stages": ["enc2"]},
    ),
    "experts alone": UDiTConfig(**UDIT, moe={"experts": 5, "top_k": 3, "shared": False}),
    "qk-norm, a block of three": DiTMoEConfig(
        **DIT, qk_norm=True, moe={"experts": 4, "every": 3, "hidden": 20, "router_time": True}
    ),
    "one expert, nothing shared": DiTMoEConfig(
        **DIT, learn_sigma=False, moe={"experts": 1, "top_k": 1, "shared": False}
    ),
}
PUBLISHED = (
    *(DiTConfig(size=size) for size in DIT_SIZES if not size.endswith("/4")),
    *(DiTMoEConfig(size=f"{name}/2-8E2A") for name in ("S", "B", "L", "XL", "G")),
    *(UDiTConfig(size=size) for size in UDIT_SIZES),
)


def by_counter(cfg: Any, form: Form, images: int) -> int:
    """Multiply-adds that torch counts in the model itself, built and run on meta."""
    size = cfg.input_size
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as flops:
        model = build_form(cfg, form)
        x = torch.empty(images, cfg.in_channels, size, size)
        model(x, torch.empty(images), torch.zeros(images, dtype=torch.int64))
    return flops.get_total_flops() // 2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_multiply_adds_of_every_shipped_config_are_those_of_the_counter(path: Path) -> None:
    cfg = config.load(path, []).model
    assert macs.total(cfg, "trained") == by_counter(cfg, "trained", 1)


@pytest.mark.parametrize("form", ["trained", "published", "merged"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_multiply_adds_of_unusual_models_are_those_of_the_counter(name: str, form: Form) -> None:
    assert macs.total(UNUSUAL[name], form, 3) == by_counter(UNUSUAL[name], form, 3)


def test_attention_in_triton_is_counted_without_what_its_mask_drops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu, "fits", lambda *given: True)
    cfg = UDiTConfig(**UDIT)  # 16 and 4 tokens a phase in three of the five stages
    assert by_counter(cfg, "trained", 3) == macs.total(cfg, "trained", 3)
    given = torch.empty(3, 4, 16, 2, 24, device="meta", requires_grad=True).unbind(0)
    with FlopCounterMode(display=False) as flops:
        out = attention(*(t.transpose(1, 2) for t in given))
        forward = flops.get_total_flops()
        out.sum().backward()
    product = 2 * 4 * 2 * 16 * 16 * 24  # of all sets and heads
    assert forward == 2 * product
    assert flops.get_total_flops() == (2 + 5) * product  # backward takes the logits again


@pytest.mark.slow
@pytest.mark.parametrize("form", ["published", "merged"])
def test_the_other_forms_of_every_shipped_u_dit_are_those_of_the_counter(form: Form) -> None:
    for path in SHIPPED:
        cfg = config.load(path, []).model
        if isinstance(cfg, UDiTConfig):
            assert macs.total(cfg, form) == by_counter(cfg, form, 1), path


@pytest.mark.slow
def test_multiply_adds_of_published_sizes_are_those_of_the_counter() -> None:
    for cfg in PUBLISHED:
        assert macs.total(cfg, "trained", 2) == by_counter(cfg, "trained", 2), cfg.size


def test_parts_of_a_block_by_hand() -> None:
    """DiT, width 36, 16 tokens, 3 heads, hidden 144: one block."""
    first = anatomy(DiTConfig(**DIT)).sites[0]
    assert {work.part: work.macs for work in macs.block(first, "trained", 1)} == {
        "adaln": 36 * 216,
        "qkv": 16 * 36 * 108,
        "attention": 2 * 16 * 16 * 36,
        "out": 16 * 36 * 36,
        "ffn": 2 * 16 * 36 * 144,
    }


def test_no_tensor_is_missing_and_each_is_cut_as_the_model_says() -> None:
    names = ("demo", "dit_b2_in256", "dit_moe_xl_in256", "proxy_udit_moe")
    shipped = [config.load(f"configs/{name}.yaml", []).model for name in names]
    for cfg in (*shipped, *UNUSUAL.values()):
        with torch.device("meta"):
            model = build(cfg)
        cuts = tensor.cuts(model)
        built = {n: (tuple(p.shape), cuts.get(id(p))) for n, p in model.named_parameters()}
        assert {p.path: (p.shape, p.cut) for p in parameters(cfg)} == built
        assert counted(cfg) == sum(p.numel for p in parameters(cfg))
        roles = {p.path: p.role for p in parameters(cfg)}
        experts = {id(p) for layer in moe_layers(model) for p in layer.experts.parameters()}
        routers = {id(p) for router in model.routers() for p in router.parameters()}
        for name, parameter in model.named_parameters():
            role = {True: "expert"}.get(id(parameter) in experts, "dense")
            assert roles[name] == ("router" if id(parameter) in routers else role)
        units = {id(p): i for i, unit in enumerate(model.units()) for p in unit.parameters()}
        where = {p.path: p.unit for p in parameters(cfg)}
        assert where == {n: units.get(id(p)) for n, p in model.named_parameters()}
