"""The benches run on a CPU, and their figures are what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import echo, fsdp
from parallel.errors import LayoutError
from parallel.launch import Place
from parallel.mesh import Mesh, MeshConfig, degrees
from parallel.rehearse import rehearsed
from pretrain import config
from pretrain.benches import attention, gpu_check, loader, moe, step
from pretrain.config import ConfigError
from pretrain.models.dit import DiTConfig
from pretrain.models.udit import UDiTConfig
from pretrain.parallelize import Compute, parallelize, sharded
from tests import ranks, tiny

CPU = torch.device("cpu")
SHAPE = {"input_size": 8, "in_channels": 16, "num_classes": 10, "learn_sigma": False}


# Each in a process of its own: torch remembers placements of an equal mesh.
@pytest.mark.parametrize("layout", [{}, {"ep": 2}, {"tp": 2}, {"dp_replicate": 2, "ep": 2}])
def test_one_rank_alone_holds_and_computes_what_that_rank_would(
    layout: dict[str, int], tmp_path: Path
) -> None:
    ranks.run(_alone, 1, layout, log=tmp_path / "log")


def _alone(layout: dict[str, int]) -> None:
    cfg = config.part(UDiTConfig, tiny.MODELS["udit-moe"] | SHAPE)
    cut = MeshConfig(**layout)
    with rehearsed(3, 4):
        mesh = Mesh(degrees(cut, 4), "cpu")
        model = sharded(cfg, cut, mesh, Compute())
        extents = {name: piece.extent for name, piece in fsdp.pieces(model, mesh).items()}
    with echo.alone_as(Place(3, 4, 3, 4), CPU):
        mesh = Mesh(degrees(cut, 4), "cpu")
        backend = parallelize(cfg, cut, mesh, Compute(), seed=0, device=CPU)
        assert {name: piece.extent for name, piece in backend.pieces.items()} == extents
        inputs = (torch.ones(2, 16, 8, 8), torch.ones(2), torch.ones(2).long())
        backend.backward(backend.model(*inputs).sum(), last=True)
        gradients = backend.gradients()
        assert all(values.isfinite().all() for values in gradients.values())
        assert all(
            g.numel() == extents[name].stop - extents[name].start for name, g in gradients.items()
        )


def test_other_ranks_of_an_echo_add_what_this_one_has(tmp_path: Path) -> None:
    ranks.run(_echoed, 1, log=tmp_path / "log")


def _echoed() -> None:
    cfg = config.part(DiTConfig, tiny.MODELS["dit"] | SHAPE)
    found = []
    for world in (1, 4):
        with echo.alone_as(Place(world - 1, world, 0, world), CPU):
            mesh = Mesh(degrees(MeshConfig(dp_replicate=world), world), "cpu")
            backend = parallelize(cfg, MeshConfig(), mesh, Compute(), seed=0, device=CPU)
            inputs = (torch.ones(2, 16, 8, 8), torch.ones(2), torch.ones(2).long())
            backend.backward(backend.model(*inputs).sum(), last=True)
            found.append(backend.gradients()["head.linear.weight"].clone())
    torch.testing.assert_close(found[1], 4 * found[0][-len(found[1]) :])


def test_steps_are_measured_alone_as_a_rank(tmp_path: Path) -> None:
    path = tiny.write(tmp_path, "dit-moe", tmp_path, mesh__ep=2, data__global_batch=8)
    ranks.run(_as_rank, 1, path, log=tmp_path / "log")
    with pytest.raises(ConfigError, match="--as-rank 4 --of 4 on 1 processes"):
        step.step(config.load(path, []), rounds=1, steps=1, as_rank=(4, 4))


def _as_rank(path: Path) -> None:
    found = step.step(config.load(path, []), rounds=1, steps=1, as_rank=(3, 4))
    assert found["ranks"] == 4
    assert found["as_rank"] == [3, 4]
    assert found["images_per_s"] == pytest.approx(8 / found["step_seconds"])
    parts = found["parts"]
    assert min(parts["forward"], parts["backward"], parts["optimizer"]) > 0


def test_experts_are_measured_beside_a_dense_layer() -> None:
    sizes = moe.Sizes(tokens=64, width=32, hidden=16, experts=8, top_k=2)
    found = moe.moe(sizes, rounds=1)
    assert [row["layer"] for row in found["rows"]] == ["dense", "balanced", "skewed"]
    dense = found["rows"][0]
    # gate, up and down of a SwiGLU as wide as two experts; forward is a third of it all
    assert sizes.flops == 3 * 2 * 64 * 3 * 32 * (2 * 16)
    assert dense["tflops"] == pytest.approx(sizes.flops / dense["seconds"] / 1e12)
    with pytest.raises(LayoutError, match="top_k=9 of 8 experts"):
        moe.moe(moe.Sizes(64, 32, 16, 8, 9), rounds=1)


def test_attention_is_measured_at_the_shapes_of_a_model() -> None:
    dense = attention.shapes(DiTConfig(size="XL/2"))
    assert dense == [("blocks", 1, 16, 256, 72)]
    unet = attention.shapes(UDiTConfig(size="S"))
    assert unet[0] == ("enc1", 4, 4, 256, 24)
    assert unet[2] == ("latent", 4, 4, 16, 96)
    cfg = config.part(DiTConfig, tiny.MODELS["dit"] | SHAPE)
    rows = attention.attention(cfg, 1, 1)["rows"]
    assert {row["kernel"] for row in rows} == {"flash", "math"}
    assert all(row["seconds"] > 0 for row in rows)


def test_the_loader_is_measured_beside_plain_reads() -> None:
    found = loader.loader(samples=64, batch=16, order="chunks", workers=1, rounds=1)
    assert found["samples_per_s"] > 0
    assert found["share"] == found["samples_per_s"] / found["raw_samples_per_s"]


def test_gpu_check_tells_what_it_skipped_what_failed_and_what_took_too_long() -> None:
    item = gpu_check.Item("one", ("pretrain", "no-such-command"), 60.0)
    assert gpu_check._one(item, 60.0)["outcome"].startswith("failed (2)")
    assert gpu_check._one(item, 1.0)["outcome"] == "skipped: no time left"
    absent = gpu_check.Item("two", ("pretrain",), needs=("no_such_package",))
    assert gpu_check._one(absent, 60.0)["outcome"] == "skipped: no_such_package not installed"
    slow = gpu_check.Item("three", ("timeit", "-n", "1", "-r", "1", "while True: pass"), 1.0)
    assert gpu_check._one(slow, 60.0)["outcome"] == "stopped after 1 s"


def test_the_table_of_gpu_check_has_a_row_for_every_step() -> None:
    steps: dict[str, Any] = {"bench": "step", "images_per_s": 712.3, "tflops_per_rank": 507.0}
    steps |= {"mfu": 0.512, "of_roofline": 0.871, "peak_gb": 61.3}
    found = {
        "chip": "NVIDIA H200",
        "versions": {"torch": "2.11"},
        "commit": "0123456789abcdef",
        "date": "2026-11-30",
        "self_test": False,
        "items": [
            {"name": "DiT-XL/2 bf16", "outcome": "ok", "result": steps},
            {"name": "fp8", "outcome": "skipped: x not installed", "result": None},
        ],
    }
    text = gpu_check.table(json.loads(json.dumps(found)))
    assert "NVIDIA H200, torch 2.11, commit 0123456789, 2026-11-30." in text
    assert "| DiT-XL/2 bf16 | 712 | 507 | 0.512 | 0.871 | 61.3 |" in text
    assert "fp8: skipped: x not installed." in text


def test_every_kind_of_result_has_words_in_the_table() -> None:
    results: list[dict[str, Any]] = [
        {"bench": "precision", "recipes": [{"recipe": "block", "gain": 1.25, "gap": 0.0012}]},
        {"bench": "moe", "rows": [{"layer": "balanced", "share": 0.91}]},
        {"bench": "attention", "rows": [{"tflops": 300.0}, {"tflops": None}]},
        {"bench": "loader", "samples_per_s": 1234.4, "share": 0.5},
    ]
    said = [gpu_check._summary({"outcome": "ok", "result": result}) for result in results]
    assert said == [
        "block 1.25× +0.12%",
        "balanced 0.91",
        "best 300 TFLOP/s",
        "1234 samples/s, 0.50 of raw reads",
    ]


def test_gpu_check_covers_what_it_promises() -> None:
    for tiny_shapes in (True, False):
        names = " ".join(item.name for item in gpu_check.items(tiny_shapes))
        for wanted in ("DiT-XL/2", "U-DiT-L", "DiT-MoE-XL", "flagship", "fp8", "tests", "loader"):
            assert wanted in names
