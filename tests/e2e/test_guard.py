"""A step that is not finite is left out on all ranks together, and leaves everything as it was."""

import json
import os
from pathlib import Path

import torch

from pretrain import inspection, objectives
from tests import ranks, tiny


def poisoned(first: int, last: int, *words: str) -> None:
    """Trains; on rank 1 alone the loss of steps first..last is not a number."""
    honest, seen = objectives.Flow.loss, [0]

    def loss(self, *args):  # type: ignore[no-untyped-def]
        seen[0] += 1
        out = honest(self, *args)
        bad = os.environ["RANK"] == "1" and first <= seen[0] <= last
        return out * torch.nan if bad else out

    objectives.Flow.loss = loss  # type: ignore[method-assign]
    ranks.pretrain(*words)


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_skipped_step_changes_nothing_but_the_clock(digits: Path, tmp_path: Path) -> None:
    config = tiny.write(tmp_path, "udit-moe", digits, checkpoint__every=100)
    short, hurt = tmp_path / "short", tmp_path / "hurt"
    ranks.train(config, short, "steps=3", world=2)
    hurt.mkdir()
    words = ("train", str(config), f"run_dir={hurt}", "steps=4")
    ranks.run(poisoned, 2, 4, 4, *words, log=hurt / "ranks.log")
    before, after = (inspection.contents(run, digest=True) for run in (short, hurt))
    assert (before["step"], after["step"]) == (3, 4)
    assert (before["skipped"], after["skipped"]) == (0, 1)
    assert after["position"] == 4 * 8
    assert before["tensors"] == after["tensors"]
    assert [line["loss"] for line in lines(short)] == [line["loss"] for line in lines(hurt)[:3]]
    assert lines(hurt)[3]["loss"] is None


def test_too_many_skips_in_a_row_end_the_run(digits: Path, tmp_path: Path) -> None:
    config = tiny.write(tmp_path, "dit", digits, max_skips=3)
    run = tmp_path / "run"
    run.mkdir()
    words = ("train", str(config), f"run_dir={run}")
    codes = ranks.wait(ranks.start(poisoned, 2, 3, 40, *words, log=run / "ranks.log"))
    assert codes == [1, 1]
    assert "3 steps in a row" in (run / "ranks.log").read_text()
    assert not (run / "done").exists()


def router_stays_fp32() -> None:
    from datetime import timedelta

    from parallel import launch
    from parallel.mesh import Mesh, MeshConfig, degrees
    from parallel.remat import RematConfig
    from pretrain import config
    from pretrain.models.moe import moe_layers
    from pretrain.models.udit import UDiTConfig
    from pretrain.parallelize import parallelize

    place = launch.Place.here()
    device = launch.join(place, threads=1, timeout=timedelta(seconds=60))
    tree = tiny.MODELS["udit-moe"] | {"input_size": 8, "in_channels": 16, "num_classes": 10}
    cfg = config.part(UDiTConfig, tree)
    mesh = Mesh(degrees(MeshConfig(), place.world), device.type)
    model = parallelize(
        cfg,
        MeshConfig(),
        mesh,
        engine="fsdp2",
        precision="bf16",
        remat=RematConfig(),
        compiled=False,
        seed=0,
        device=device,
    ).model
    layer = moe_layers(model)[0]
    seen = []
    router, experts = type(layer.router).forward, type(layer.experts).forward

    def watch_router(self, x, time):  # type: ignore[no-untyped-def]
        # bf16 keeps 8 bits of a weight; an fp32 one that was rounded has nothing below them
        rounded = self.weight.detach().bfloat16().float()
        seen.append(("router", self.weight.dtype, bool((rounded != self.weight).any())))
        return router(self, x, time)

    def watch_experts(self, rows, counts):  # type: ignore[no-untyped-def]
        seen.append(("experts", self.gate.dtype, True))
        return experts(self, rows, counts)

    type(layer.router).forward = watch_router
    type(layer.experts).forward = watch_experts
    model(torch.randn(4, 16, 8, 8), torch.rand(4) * 1000, torch.zeros(4, dtype=torch.int64))
    assert ("router", torch.float32, True) in seen
    assert ("experts", torch.bfloat16, True) in seen
    assert len(seen) == 2 * len(moe_layers(model))
    launch.leave()


def test_routers_compute_with_unrounded_weights_in_bf16() -> None:
    ranks.run(router_stays_fp32, 2)
