"""Counts of the published models, and what one rank holds beside the shards that are built."""

import json
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel import fsdp
from parallel.errors import LayoutError
from parallel.mesh import Degrees, Mesh, degrees
from parallel.rehearse import rehearsed
from parallel.shards import local
from pretrain import config
from pretrain.cluster import site
from pretrain.cluster.site import Efficiency, LinkFile, LinksError, Rates
from pretrain.models.build import build
from pretrain.models.dit import DiTConfig, DiTMoEConfig
from pretrain.models.udit import UDiTConfig
from pretrain.parallelize import sharded
from pretrain.planning import planned
from pretrain.planning.layout import Layout
from pretrain.planning.macs import flops_per_image
from pretrain.planning.memory import reduced
from pretrain.planning.plan import plan

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
        pytest.param("B", 231_251_304, 26.509, 22.179, marks=pytest.mark.slow),
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
        Degrees(dp_shard=16, ep=8), precision="bf16", micro_batch=64, reshard_after_forward=False
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
    num_heads=3,
    depth=(1, 2, 1, 1, 1),
    input_size=16,
    num_classes=10,
    moe={"experts": 6, "every": 2},
)


@pytest.mark.parametrize(
    "sizes",
    [
        Degrees(),
        Degrees(dp_shard=3),
        Degrees(dp_shard=16),
        Degrees(dp_replicate=2, dp_shard=3),
        Degrees(dp_shard=2, tp=3),
        Degrees(dp_shard=2, tp=3, ep=6),
        Degrees(dp_replicate=4, dp_shard=4, tp=3, ep=2),
    ],
    ids=lambda sizes: "×".join(f"{name}{n}" for name, n in asdict(sizes).items() if n > 1) or "1",
)
@pytest.mark.parametrize("cfg", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_bytes_of_a_rank_are_those_of_the_shards_that_are_built(
    cfg: DiTConfig | UDiTConfig, sizes: Degrees
) -> None:
    assert standing(cfg, Layout(sizes)) == built_for(cfg, sizes)
    held = asdict(plan(cfg, Layout(sizes)).per_rank)
    assert held.pop("total") == sum(held.values())


def standing(cfg: Any, layout: Layout) -> dict[str, int]:
    """What stands between steps by the plan, and the gradients after backward."""
    held = asdict(plan(cfg, layout).per_rank)
    return {n: held[n] for n in ("weights", "optimizer", "ema")} | {"grads": reduced(cfg, layout)}


def test_every_average_is_counted() -> None:
    sizes = Degrees(dp_replicate=2, dp_shard=3)
    cfg = config.validate(tree_of(DENSE, sizes, half_lives=[9], power=[0.1]))
    made = planned.of(cfg, 6, "cpu")
    assert made["per_rank"]["ema"] == built(cfg, sizes)["ema"]
    assert made["per_rank"]["ema"] == 3 * built_for(DENSE, sizes)["ema"]
    assert plan(DENSE, Layout(sizes)).per_rank.ema == built_for(DENSE, sizes)["ema"]


def built_for(cfg: Any, sizes: Degrees) -> dict[str, int]:
    return built(config.validate(tree_of(cfg, sizes)), sizes)


def built(cfg: config.Config, sizes: Degrees, rank: int = 0) -> dict[str, int]:
    """Bytes of the shards that stand on a rank: the model cut on meta, in a rehearsed world."""
    with rehearsed(rank, sizes.world):
        mesh = Mesh(sizes, "cpu")
        model = sharded(cfg.model, cfg.mesh, mesh, cfg.compute)
        shards = [local(parameter) for parameter in model.parameters()]
        owned = [piece.values for piece in fsdp.pieces(model, mesh).values()]
    held, own = (sum(t.numel() * t.element_size() for t in ts) for ts in (shards, owned))
    return {
        "weights": held,
        "grads": held + (own if sizes.dp_replicate > 1 else 0),
        "optimizer": 2 * own,
        "ema": len(cfg.ema.names) * own,
    }


def tree_of(cfg: Any, sizes: Degrees, **ema: Any) -> dict[str, Any]:
    mesh = {name: getattr(sizes, name) for name in ("dp_replicate", "dp_shard", "tp", "ep")}
    return {
        "model": cfg.model_dump(),
        "objective": {"kind": "flow"},
        "data": {"path": "nowhere", "global_batch": sizes.data},
        "schedule": {"kind": "constant"},
        "steps": 1,
        "run_dir": "nowhere",
        "mesh": mesh,
        "ema": ema,
    }


@pytest.mark.parametrize(
    ("path", "words", "ranks"),
    [
        ("configs/udit_xl_moe.yaml", (), 16),
        pytest.param(
            "configs/udit_xl_moe.yaml",
            ("data.global_batch=768", "accum=1", "remat.mode=none"),
            16,
            marks=pytest.mark.slow,
        ),
        (
            "configs/dit_moe_xl_in256.yaml",
            ("model.size=G/2-16E2A", "mesh.dp_shard=32", "accum=1"),
            32,
        ),
    ],
    ids=["flagship", "flagship without remat", "DiT-MoE-G"],
)
def test_the_largest_models_stand_as_planned_and_fit(
    path: str, words: tuple[str, ...], ranks: int
) -> None:
    cfg = config.load(path, list(words))
    one = planned.counted(cfg, ranks, "h100")
    assert built(cfg, one.layout.sizes) == standing(cfg.model, one.layout)
    values = planned.of(cfg, ranks, "h100")
    assert values["per_rank"]["total"] < 80 << 30
    assert values["fits_memory"] is True
    assert values["step_seconds"] >= values["compute_seconds"]
    assert values["gpu_hours"] == values["hours"] * ranks


@pytest.mark.parametrize(
    ("world", "mesh"), [pytest.param(512, "ep=8", marks=pytest.mark.slow), (1024, "ep=64")]
)
def test_a_thousand_ranks_are_built_fast_and_share_out_every_slot(world: int, mesh: str) -> None:
    words = [f"mesh.{mesh}", "mesh.dp_replicate=4", "mesh.dp_shard=null", "accum=1", "mesh.tp=2"]
    cfg = config.load("configs/udit_xl_moe.yaml", [*words, "data.global_batch=4096"])
    sizes = degrees(cfg.mesh, world)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(built(cfg, sizes, rank=world - 1).values()) > 0
    assert time.monotonic() - start < 60
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 4e9
    for rank in (0, 1, world // 2 + 1, world - 1):
        with rehearsed(rank, world):
            data = Mesh(sizes, "cpu").data
        assert (data.rank, data.size) == (sizes.data_rank(rank), sizes.data)
    slots = [
        slot for rank in range(0, world, sizes.tp) for slot in slots_of(rank, sizes, 4096).tolist()
    ]
    assert sorted(slots) == list(range(4096))


def slots_of(rank: int, sizes: Degrees, batch: int) -> np.ndarray:
    share = batch // sizes.data
    return np.arange(share) + sizes.data_rank(rank) * share


def test_degrees_move_bytes_as_they_should() -> None:
    cfg = EXPERTS
    alone = plan(cfg, Layout(micro_batch=64)).per_rank
    twice = plan(cfg, Layout(micro_batch=128)).per_rank
    assert twice.activations == pytest.approx(2 * alone.activations, rel=0.01)
    half = plan(cfg, Layout(micro_batch=64, precision="bf16")).per_rank
    assert half.weights == alone.weights
    assert 2 * half.gathered == alone.gathered
    assert 0.5 < half.activations / alone.activations < 1
    kept = plan(cfg, Layout(micro_batch=64, reshard_after_forward=False)).per_rank
    assert kept.gathered == alone.weights > alone.gathered
    whole: dict[str, Any] = {"micro_batch": 64, "reshard_after_forward": False}
    shard = plan(cfg, Layout(Degrees(dp_shard=2), **whole)).per_rank
    replica = plan(cfg, Layout(Degrees(dp_replicate=2))).per_rank
    assert replica.weights == alone.weights
    assert 2 * replica.optimizer == pytest.approx(alone.optimizer, rel=1e-3)  # odd tensors
    split = plan(cfg, Layout(Degrees(dp_shard=2, ep=2), **whole)).per_rank
    assert split.gathered < shard.gathered


def test_executed_flops_lie_between_those_of_the_merged_and_the_published_graph() -> None:
    made = plan(EXPERTS, Layout())
    one, many = flops_per_image(EXPERTS), flops_per_image(EXPERTS, 64)
    assert 6 * made.macs_forward_merged < many < one < made.flops_train_per_image
    # where a tensor axis cuts pairs they run one after the other
    cut = plan(EXPERTS, Layout(Degrees(tp=3), micro_batch=64)).flops_executed_per_image
    whole = plan(EXPERTS, Layout(micro_batch=64)).flops_executed_per_image
    assert whole == many < cut < made.flops_train_per_image
    cfg = config.validate(tree_of(EXPERTS, Degrees(dp_shard=2)))
    batch = cfg.data.model_copy(update={"global_batch": 256})
    run = cfg.model_copy(update={"data": batch, "accum": 2})
    assert planned.executed(run, Degrees(dp_shard=2)) == many
    assert planned.executed(run, Degrees(dp_shard=1, tp=2)) > many


@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero2", "zero3"])
def test_every_engine_is_planned_and_offload_moves_states_to_the_host(engine: str) -> None:
    made = {}
    for offload in (False, True):
        cfg = config.validate(tree_of(DENSE, Degrees(dp_shard=2)) | {"engine": engine})
        mesh = cfg.mesh.model_copy(update={"offload": offload})
        cfg = cfg.model_copy(update={"mesh": mesh})
        made[offload] = planned.counted(cfg, 2, "h100").plan.per_rank
    assert made[False].host == 0
    assert made[True].host >= made[False].weights + made[False].optimizer + made[False].ema
    assert made[True].total < made[False].total


@pytest.mark.parametrize(
    ("words", "device", "price", "said"),
    [
        ({}, "h900", None, "known devices are a100"),
        ({}, "h100", -1.0, "expected what a GPU hour costs"),
        ({}, "h100", float("nan"), "expected what a GPU hour costs"),
        ({"precision": "fp8"}, "a100", None, "has no FP8; set precision=bf16"),
        ({"engine": "zero3", "mesh": {"ep": 2}}, "h100", None, "set engine=zero2"),
        ({"engine": "zero1", "mesh": {"dp_replicate": 2}}, "h100", None, "keeps no replicas"),
        ({"mesh": {"ep": 4}}, "h100", None, "set mesh.ep=2"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(
    words: dict[str, Any], device: str, price: float | None, said: str
) -> None:
    cfg = config.validate(tree_of(EXPERTS, Degrees(dp_shard=2)) | {"mesh": {}} | words)
    with pytest.raises(ValueError, match=said):
        planned.of(cfg, 2, device, price=price)


def test_expert_degree_that_does_not_fit_is_refused() -> None:
    with pytest.raises(LayoutError, match="ep=4 must divide"):
        plan(EXPERTS, Layout(Degrees(dp_shard=4, ep=4)))


def test_hours_come_from_the_site_or_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETRAIN_SITE", str(tmp_path))
    cfg = config.validate(tree_of(DENSE, Degrees(dp_shard=2)))
    blind = planned.of(cfg, 2, "cpu")
    assert blind["hours"] is blind["step_seconds"] is None
    assert "no figures for a cpu" in blind["hours_basis"]
    sheet = planned.of(cfg, 2, "h200")
    assert sheet["hours_basis"].startswith("assumed")
    site.write(FILE)
    measured = planned.of(cfg, 2, "cpu")
    flops = measured["flops_train_per_image"]  # one step of one image a rank
    assert measured["compute_seconds"] == pytest.approx(flops / (0.5 * 1e12))
    assert "measured on 2026-11-21" in measured["hours_basis"]
    assert [row["axis"] for row in measured["communication"]] == ["dp_shard", "dp_shard"]
    other = planned.of(cfg, 2, "h200")
    assert other["hours"] == sheet["hours"]
    assert "was measured on some CPU" in other["hours_basis"]
    with pytest.raises(LinksError, match="some CPU"):
        planned.of(cfg, 2, "h200", links=tmp_path / "links.json")
    site.write(FILE.model_copy(update={"efficiency": {}}))
    assert planned.of(cfg, 2, "cpu")["hours"] is None


FILE = LinkFile(
    chip="some CPU",
    device="cpu",
    gpus_per_node=2,
    nodes=1,
    date="2026-11-21",
    commit=None,
    inside=Rates(all_reduce=1.0, all_gather=1.0, reduce_scatter=1.0, all_to_all=1.0),
    across=None,
    world=None,
    matmul_tflops=1.0,
    copy_gb_per_s=1.0,
    efficiency={"some": Efficiency(flops_per_image=1, of_matmul=0.5)},
    save_gb_per_s=None,
    load_gb_per_s=None,
)


def test_plan_is_plain_data() -> None:
    made = json.loads(json.dumps(asdict(plan(DENSE, Layout()))))
    keys = {"weights", "grads", "optimizer", "ema", "activations", "total"}
    assert keys <= set(made["per_rank"])
    assert made["warnings"] == []
