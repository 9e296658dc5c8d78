"""What a plan proposes, says on the screen, and says of itself once a run has measured."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel.chips import CHIPS, chip_of, measured_matmul, peak
from parallel.mesh import Degrees
from pretrain import config
from pretrain.models.dit import DiTConfig
from pretrain.planning import compare, hours, memory, planned, proposals, screen
from pretrain.planning.compare import Prediction
from pretrain.planning.layout import Layout
from tests import ranks

FLAGSHIP = "configs/udit_xl_moe.yaml"


def of_flagship(gpus: int, *words: str) -> dict[str, Any]:
    return planned.of(config.load(FLAGSHIP, list(words)), gpus, "h100", search=True)


def test_the_flagship_gets_layouts_that_fit_and_always_the_same() -> None:
    found = of_flagship(64)
    best = found["proposals"]
    assert 0 < len(best) <= proposals.TOP
    assert found["layouts_fit"] <= found["layouts_tried"]
    assert all(one["memory"] <= CHIPS["h100"].memory for one in best)
    steps = [one["step_seconds"] for one in best]
    assert steps[0] <= 1.01 * min(steps)
    assert steps[0] <= found["step_seconds"]
    assert any(one["words"].find("mesh.ep=16") >= 0 for one in best)  # across nodes
    assert json.loads(json.dumps(of_flagship(64))) == json.loads(json.dumps(found))


def test_a_proposal_plans_as_it_was_proposed() -> None:
    for one in of_flagship(16)["proposals"]:
        again = planned.of(config.load(FLAGSHIP, one["words"].split()), 16, "h100")
        assert again["per_rank"]["total"] == one["memory"]
        assert again["step_seconds"] == one["step_seconds"]
        assert again["micro_batch"] == one["micro_batch"]


def test_where_nothing_fits_it_says_what_is_largest_and_what_to_change() -> None:
    found = of_flagship(1, "mesh.ep=1", "data.global_batch=64", "accum=1")
    assert found["proposals"] == ()
    assert found["fits_memory"] is False
    for word in ("nothing fits", "its largest part is", "of 85.9 GB", "GPUs", "more memory"):
        assert word in found["nothing_fits"]


def test_no_layout_is_proposed_that_the_engine_refuses() -> None:
    cfg = config.load(FLAGSHIP, ["engine=zero3", "mesh.ep=1", "mesh.reshard_after_forward=true"])
    now = planned.counted(cfg, 8, "h100").layout
    tried = list(proposals.candidates(cfg.model, now, cfg.data.global_batch))
    assert {(t.sizes.dp_replicate, t.sizes.tp, t.sizes.ep) for t in tried} == {(1, 1, 1)}
    dense = DiTConfig(size="S/2")
    axes = {t.sizes.tp for t in proposals.candidates(dense, Layout(Degrees(dp_shard=8)), 256)}
    assert axes == {1, 2}  # of 6 heads
    compiled = list(proposals.candidates(dense, Layout(Degrees(dp_shard=8)), 256, compiled=True))
    assert {t.sizes.tp for t in compiled if t.remat.mode == "full"} == {1}
    assert {t.sizes.tp for t in compiled if t.remat.mode == "selective"} == {1, 2}


def test_more_memory_is_never_worse() -> None:
    cfg = DiTConfig(size="B/2")
    now = Layout(Degrees(dp_shard=8), precision="bf16", device="h100")
    figures = hours.assumed(CHIPS["h100"], 8)
    rooms = [proposals.search(cfg, now, 2048, room << 30, figures) for room in (8, 16, 80)]
    assert [r.layouts_fit for r in rooms] == sorted(r.layouts_fit for r in rooms)
    seconds = [r.proposals[0].step_seconds or 0 for r in rooms]
    assert seconds[0] >= 0.99 * seconds[2]
    assert all(memory.per_rank(cfg, t).total > 0 for t in proposals.candidates(cfg, now, 8))


def test_the_screen_says_what_people_ask(capsys: pytest.CaptureFixture[str]) -> None:
    screen.show(of_flagship(16) | {"cost": 12.5}, name="udit_xl_moe")
    said = capsys.readouterr().out
    for word in (
        "9.9 B, 3.11 B active",
        "fits",
        "bound by",
        "MFU",
        "break-even",
        "costs 12.50",
        "tok/expert",
        "layouts that fit",
        "tokens to experts and back",
    ):
        assert word in said, word
    assert max(len(line.rstrip()) for line in said.splitlines()) <= screen.WIDTH
    ranks_of_cpu = config.load("configs/demo.yaml", ["mesh.ep=1"])
    screen.show(planned.of(ranks_of_cpu, 2, "cpu", search=True), name="demo")
    assert "not predicted" in capsys.readouterr().out


def test_a_prediction_is_one_line_with_its_errors() -> None:
    told = Prediction(11 * 10**9, 2.0, "assumed: much").line(10e9, 2.5)
    assert told == (
        "plan: memory 11 GB predicted, 10 measured (+10 %); step 2 s predicted, 2.5 measured "
        "(-20 %); assumed: much"
    )
    told = Prediction(10**9, None, "no figures for a cpu").line(1e9, 2.5)
    assert "a step took 2.5 s; it was not predicted: no figures for a cpu" in told
    cfg = config.load("configs/demo.yaml", [])
    made = planned.prediction(cfg, 2, torch.device("cpu"))
    assert made.memory == planned.counted(cfg, 2).plan.per_rank.total
    assert made.step_seconds is None
    assert "acceptance.sh" in made.basis


def _grow() -> None:
    seen = compare.Resident(torch.device("cpu"))
    held = torch.ones(16 << 20)
    assert 1 < seen.peak() / (held.numel() * 4) < 1.3


def test_memory_of_a_cpu_run_is_what_the_process_grows_by() -> None:
    ranks.run(_grow, 1)


def test_chips_are_known_by_the_names_their_drivers_give() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA B200": "b200",
    }
    assert {name: chip_of(name) for name in names} == {n: CHIPS[key] for n, key in names.items()}
    assert chip_of("NVIDIA GeForce RTX 4090") is None


def test_a_chip_that_is_in_no_table_is_measured() -> None:
    rate, basis = peak(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14
    assert "measured" in basis
    assert measured_matmul(torch.device("cpu")) > 0


def test_a_room_for_fragments_is_left_on_gpus_only() -> None:
    layout = Layout(micro_batch=4)
    cpu, gpu = (
        memory.per_rank(DiTConfig(size="S/2"), replace(layout, device=device))
        for device in ("cpu", "h100")
    )
    assert cpu.fragments == 0
    assert gpu.total == pytest.approx((1 + memory.FRAGMENTS) * cpu.total + memory.CONTEXT)
