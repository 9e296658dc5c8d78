"""A step that is not finite is left out on all ranks together, and leaves everything as it was."""

import json
import os
import re
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.loader import Loader
from pretrain import inspection, objectives
from pretrain.manifest import locate, read_manifest
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
    config = tiny.write(tmp_path, "dit-moe", digits, checkpoint__every=100)
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


def planted(bad: list[int], *words: str) -> None:
    """Trains; latents at these positions of the data are not numbers."""
    honest = Loader._load

    def load(self, positions, ids):  # type: ignore[no-untyped-def]
        batch = honest(self, positions, ids)
        hurt = torch.from_numpy(np.isin(positions, bad))[:, None, None, None]
        return replace(batch, x=torch.where(hurt, torch.nan, batch.x))

    Loader._load = load  # type: ignore[method-assign]
    ranks.pretrain(*words)


def seen(run: Path) -> list[tuple[int, int]]:
    """(step, position) of the batches of the surviving history; all ranks agree on them."""
    files = sorted((run / "seen").iterdir())
    found = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    places = [[(line["step"], line["position"]) for line in rank] for rank in found]
    assert all(place == places[0] for place in places)
    for parts in zip(*found, strict=True):
        assert sorted(slot for part in parts for slot in part["slots"]) == list(range(8))
    return places[0]


# Steps 7, 8 and 9 read positions 48 to 72; one bad sample spoils each, on either rank.
BAD, LOST = [49, 63, 65], (48, 72)


def test_after_skips_in_a_row_the_run_goes_back_and_passes_over_exactly_that_data(
    digits: Path, tmp_path: Path
) -> None:
    changes = {"guard__max_skips": 3, "checkpoint__every": 5, "log__sample_ids": True, "steps": 24}
    changes["ema__power"] = [0.1]
    config = tiny.write(tmp_path, "dit-moe", digits, **changes)
    calm, hurt = tmp_path / "calm", tmp_path / "hurt"
    for run in (calm, hurt):
        run.mkdir()
    words = ("train", str(config), f"run_dir={calm}")
    ranks.run(planted, 2, BAD, *words, log=calm / "ranks.log")
    said = log_of(calm)
    assert said.count("is left out: loss is not finite, gradient norm is not finite") == 3
    assert said.count("rolled back from step 10 to step 5") == 1
    assert f"positions {LOST[0]} to {LOST[1]}" in said
    found = inspection.contents(calm, digest=True)
    manifest = read_manifest(locate(calm))["state"]
    assert manifest["passed_over"] == [list(LOST)]
    assert (found["step"], found["skipped"], found["position"]) == (24, 0, (24 + 3) * 8)
    positions = [8 * i for i in range(27) if not LOST[0] <= 8 * i < LOST[1]]
    assert seen(calm) == list(enumerate(positions, start=1))
    assert [line["step"] for line in lines(calm)] == list(range(1, 25))
    assert all(line["loss"] is not None for line in lines(calm))

    words = ("train", str(config), f"run_dir={hurt}")
    for goal in ("rolled back", "step 16/24"):  # killed after the roll-back and later on
        started = ranks.start(planted, 2, BAD, *words, log=hurt / "ranks.log")
        kill_when(goal, hurt / "ranks.log", started)
    ranks.run(planted, 2, BAD, *words, log=hurt / "ranks.log")
    assert seen(hurt) == seen(calm)
    assert inspection.contents(hurt, digest=True)["tensors"] == found["tensors"]
    assert [line["loss"] for line in lines(hurt)] == [line["loss"] for line in lines(calm)]


def kill_when(said: str, log: Path, started: list[BaseProcess]) -> None:
    while not (log.exists() and said in log.read_text()):
        assert all(process.is_alive() for process in started), log.read_text()
        time.sleep(0.005)
    for process in started:
        process.kill()
    assert -9 in ranks.wait(started)


def test_a_run_that_is_lost_from_one_step_twice_ends_and_says_so(
    digits: Path, tmp_path: Path
) -> None:
    changes = {"guard__max_skips": 3, "checkpoint__every": 2}
    config = tiny.write(tmp_path, "dit", digits, **changes)
    run = tmp_path / "run"
    run.mkdir()
    words = ("train", str(config), f"run_dir={run}")
    codes = ranks.wait(ranks.start(poisoned, 2, 6, 99, *words, log=run / "ranks.log"))
    assert codes == [1, 1]
    said = (run / "ranks.log").read_text()
    # from step 6 on; at 6 and 8 nothing is saved, or there would always be a newer way back
    assert said.count("is left out") == 6
    assert said.count("rolled back from step 8 to step 4") == 1
    assert "NoWayBackError: rolled back to step 4 a second time" in said
    assert not (run / "done").exists()


def loud(position: int, *words: str) -> None:
    """Trains; the batch that begins at this position is a hundred times as large."""
    honest = Loader._load

    def load(self, positions, ids):  # type: ignore[no-untyped-def]
        batch = honest(self, positions, ids)
        return replace(batch, x=batch.x * (100.0 if positions[0] == position else 1.0))

    Loader._load = load  # type: ignore[method-assign]
    ranks.pretrain(*words)


def test_a_spike_is_left_out_and_named_with_its_limit(digits: Path, tmp_path: Path) -> None:
    config = tiny.write(tmp_path, "dit", digits, steps=12, guard__after=6)
    run = tmp_path / "run"
    run.mkdir()
    words = ("train", str(config), f"run_dir={run}")
    ranks.run(loud, 1, 8 * 9, *words, log=run / "ranks.log")
    said = re.findall(r"step (\d+) is left out: loss (\S+) is above (\S+),", log_of(run))
    assert [step for step, *_ in said] == ["10"]
    value, limit = map(float, said[0][1:])
    assert value == pytest.approx(lines(run)[9]["loss"], rel=1e-3)
    assert 2 * min(float(str(line["loss"])) for line in lines(run)) < limit < value / 100
    assert [line["skipped"] for line in lines(run)][-1] == 1
    assert "rolled back" not in log_of(run)


def log_of(run: Path) -> str:
    return (run / "log.txt").read_text()


def router_stays_fp32() -> None:
    from datetime import timedelta

    from parallel import launch
    from parallel.mesh import Mesh, MeshConfig, degrees
    from pretrain import config
    from pretrain.models.moe import moe_layers
    from pretrain.models.udit import UDiTConfig
    from pretrain.parallelize import Compute, parallelize

    place = launch.Place.here()
    device = launch.join(place, threads=1, timeout=timedelta(seconds=60))
    tree = tiny.MODELS["udit-moe"] | {"input_size": 8, "in_channels": 16, "num_classes": 10}
    cfg = config.part(UDiTConfig, tree)
    mesh = Mesh(degrees(MeshConfig(), place.world), device.type)
    model = parallelize(
        cfg,
        MeshConfig(),
        mesh,
        Compute(precision="bf16"),
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
