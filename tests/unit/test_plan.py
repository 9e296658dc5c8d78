"""Counts of the published models, made from the built model, and what one rank holds."""

import json
from dataclasses import asdict

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parallel.errors import LayoutError
from pretrain.models.build import build
from pretrain.models.dit import DiTConfig, DiTMoEConfig
from pretrain.models.udit import UDiTConfig
from pretrain.plan import Layout, flops_per_image, plan

FLAGSHIP = UDiTConfig(
    width=768,
    head_dim=128,
    adaln_lora=8,
    moe={"experts": 64, "top_k": 4, "hidden_ratio": 0.25, "stages": ["latent"]},
)


@pytest.mark.parametrize(
    ("size", "params", "giga_macs"),
    [
        ("S/2", 32_865_056, 6.056),
        ("B/2", 130_315_808, 23.005),
        ("B/4", 130_426_496, 5.565),
        ("L/2", 457_840_672, 80.698),
        ("XL/2", 674_834_720, 118.621),
        ("XL/8", 675_664_640, 7.392),
    ],
)
def test_dit_has_its_published_counts(size: str, params: int, giga_macs: float) -> None:
    made = plan(DiTConfig(size=size), Layout())
    assert made.params_total == made.params_active == params
    assert made.macs_forward == made.macs_forward_merged
    assert round(made.macs_forward / 1e9, 3) == giga_macs
    assert made.flops_train_per_image == 6 * made.macs_forward


@pytest.mark.parametrize(
    ("size", "params", "trained", "merged"),
    [
        ("S", 58_896_568, 7.129, 6.021),
        ("B", 231_251_304, 26.509, 22.179),
        ("L", 916_335_304, 102.025, 84.909),
    ],
)
def test_udit_has_its_published_counts(
    size: str, params: int, trained: float, merged: float
) -> None:
    made = plan(UDiTConfig(size=size), Layout())
    assert made.params_total == params
    assert round(made.macs_forward / 1e9, 3) == trained
    assert round(made.macs_forward_merged / 1e9, 3) == merged
    assert sum(row.params for row in made.stages) == params
    assert sum(row.macs for row in made.stages) == made.macs_forward
    assert sum(row.macs_merged for row in made.stages) == made.macs_forward_merged


@pytest.mark.parametrize(
    ("size", "total", "active", "giga_macs"),
    [
        ("S/2-8E2A", 199.2, 71.9, 16.031),
        ("S/2-16E2A", 369.1, 71.9, 16.04),
        ("B/2-8E2A", 795.7, 286.3, 62.887),
        ("L/2-8E2A", 2823.5, 1011.8, 222.482),
        ("XL/2-8E2A", 4167.9, 1492.7, 327.966),
        ("G/2-16E2A", 16503.4, 3181.6, 698.327),
    ],
)
def test_dit_moe_has_its_published_counts(
    size: str, total: float, active: float, giga_macs: float
) -> None:
    made = plan(DiTMoEConfig(size=size), Layout())
    assert round(made.params_total / 1e6, 1) == total
    assert round(made.params_active / 1e6, 1) == active
    assert round(made.macs_forward / 1e9, 3) == giga_macs


def test_flagship_is_as_designed() -> None:
    layout = Layout(
        dp_shard=16, ep=8, precision="bf16", micro_batch=64, reshard_after_forward=False
    )
    made = plan(FLAGSHIP, layout)
    assert made.params_total == pytest.approx(9.9e9, rel=0.005)
    assert made.params_active == pytest.approx(3.1e9, rel=0.005)
    assert made.macs_forward_merged == pytest.approx(361e9, rel=0.005)
    latent = next(row for row in made.stages if row.name == "latent")
    assert latent.moe_layers == 16
    assert latent.all_to_all_bytes == pytest.approx(101e6, rel=0.005)
    assert latent.tokens_per_expert == 1024 * 64 * 4 / 64
    assert latent.rows_per_expert == 64 * 8 * 64 * 4 / 64
    assert any("tokens per expert" in warning for warning in made.warnings)
    assert any("2048" in warning for warning in made.warnings)
    with torch.device("meta"):
        model = build(FLAGSHIP)
    adaln = sum(p.numel() for n, p in model.named_parameters() if ".adaln." in n)
    assert adaln == pytest.approx(0.26e9, rel=0.02)


DENSE = DiTConfig(depth=2, width=36, num_heads=3, patch=2, input_size=8, num_classes=10)
EXPERTS = UDiTConfig(
    width=12,
    num_heads=1,
    depth=(1, 2, 1, 1, 1),
    input_size=16,
    num_classes=10,
    moe={"experts": 6, "every": 2},
)


@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("cfg", [DENSE, EXPERTS])
def test_bytes_of_a_rank_are_the_chunks_that_fsdp_cuts(
    cfg: DiTConfig | UDiTConfig, ranks: int
) -> None:
    with torch.device("meta"):
        model = build(cfg)
    mine = sum(p.chunk(ranks)[0].numel() for p in model.parameters())
    held = plan(cfg, Layout(dp_shard=ranks)).per_rank
    assert held.weights == held.grads == held.ema == 4 * mine
    assert held.optimizer == 8 * mine
    parts = asdict(held)
    assert parts.pop("total") == sum(parts.values())


def test_degrees_move_bytes_as_they_should() -> None:
    cfg = EXPERTS
    alone = plan(cfg, Layout(micro_batch=2)).per_rank
    assert plan(cfg, Layout(micro_batch=4)).per_rank.activations == 2 * alone.activations
    half = plan(cfg, Layout(micro_batch=2, precision="bf16")).per_rank
    assert half.weights == alone.weights
    assert 2 * half.gathered == alone.gathered
    assert 0.5 < half.activations / alone.activations < 1
    kept = plan(cfg, Layout(micro_batch=2, reshard_after_forward=False)).per_rank
    assert kept.gathered == alone.weights > alone.gathered
    shard = plan(cfg, Layout(dp_shard=2)).per_rank
    assert plan(cfg, Layout(dp_replicate=2)).per_rank.optimizer == shard.optimizer
    assert plan(cfg, Layout(dp_shard=2, ep=2)).per_rank.gathered < shard.gathered


def test_equal_blocks_counted_once_give_what_a_whole_run_gives() -> None:
    cfg = EXPERTS
    with torch.device("meta"), FlopCounterMode(display=False) as flops, torch.no_grad():
        build(cfg)(torch.empty(1, 4, 16, 16), torch.empty(1), torch.zeros(1, dtype=torch.int64))
    assert flops_per_image(cfg) == 3 * flops.get_total_flops()
    assert 0.95 < flops_per_image(cfg) / plan(cfg, Layout()).flops_train_per_image < 1


@pytest.mark.parametrize("ep", [4, 3])
def test_expert_degree_that_does_not_fit_is_refused(ep: int) -> None:
    with pytest.raises(LayoutError, match=f"ep={ep} must divide"):
        plan(EXPERTS, Layout(dp_shard=4, ep=ep))


def test_plan_is_plain_data() -> None:
    made = json.loads(json.dumps(asdict(plan(DENSE, Layout()))))
    keys = {"weights", "grads", "optimizer", "ema", "activations", "total"}
    assert keys <= set(made["per_rank"])
    assert made["warnings"] == []
