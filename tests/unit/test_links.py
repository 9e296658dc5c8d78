"""What collectives reach, tokens to experts and back, and the report an acceptance ends in."""

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from parallel import launch, links
from parallel.errors import LayoutError
from parallel.launch import Place
from pretrain.benches import report as reports
from pretrain.benches.dispatch import Sizes
from pretrain.cluster import site
from pretrain.cluster.site import LinksError
from pretrain.planning import planned
from tests import ranks, tiny

HEAD = {"bench", "chip", "commit", "versions", "date", "ranks", "nodes"}


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert links.bus_factor("all_reduce", 8) == 2 * 7 / 8
    for name in ("all_gather", "reduce_scatter", "all_to_all"):
        assert links.bus_factor(name, 8) == 7 / 8
        assert links.bus_factor(name, 1) == 0


def test_nodes_of_different_size_are_refused() -> None:
    assert links.nodes_of(Place(0, 16, 0, 8)) == 2
    with pytest.raises(LayoutError, match="same number of ranks"):
        links.nodes_of(Place(0, 12, 0, 8))


def _two_nodes_of_two(out: Path) -> None:
    """Four ranks that take themselves to stand on two nodes."""
    rank = int(os.environ["RANK"])
    os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    place = launch.Place.here()
    device = launch.join(place, threads=1, timeout=timedelta(seconds=60))
    members = {}
    for span, group in links._spans(place, device).items():
        mine = torch.tensor(10**rank)
        dist.all_reduce(mine, group=group)
        members[span] = int(mine)
    assert members == {
        "inside": (11, 1100)[rank // 2],
        "across": (101, 1010)[rank % 2],
        "world": 1111,
    }
    pair = links._spans(place, device)["inside"]
    rates: list[float] = [0.0] * 4
    dist.all_gather_object(rates, links.bus_bandwidth(pair, device, 40_000, rounds=1))
    assert rates[0] == rates[1] > 0
    assert rates[2] == rates[3] > 0
    assert links.own_tflops(device, rounds=1) > 0
    found = links.measure(place, device, [1600, 40_000], rounds=1)
    if rank == 0:
        out.write_text(json.dumps([vars(link) for link in found]))
    launch.leave()


def test_every_collective_is_measured_over_every_span(tmp_path: Path) -> None:
    ranks.run(_two_nodes_of_two, 4, tmp_path / "links.json", log=tmp_path / "log")
    rows = json.loads((tmp_path / "links.json").read_text())
    assert [(row["span"], row["collective"], row["bytes"]) for row in rows] == [
        (span, name, size)
        for span in ("inside", "across", "world")
        for name in links.COLLECTIVES
        for size in (1600, 40_000)
    ]
    for row in rows:
        assert row["ranks"] == (4 if row["span"] == "world" else 2)
        factor = links.bus_factor(row["collective"], row["ranks"])
        assert row["gb_per_s"] * row["seconds"] * 1e9 == pytest.approx(row["bytes"] * factor)
        assert row["seconds"] > 0


def test_bench_dispatch_says_what_it_measured(tmp_path: Path) -> None:
    words = ("--tokens", "64", "--width", "32", "--experts", "4", "--top-k", "2", "--rounds", "1")
    out = tmp_path / "new" / "dispatch.json"
    command = ("bench", "dispatch", *words, "--nproc", "0", "--out", str(out))
    ranks.run(ranks.pretrain, 2, *command, log=tmp_path / "log")
    found = json.loads(out.read_text())
    assert set(found) >= HEAD
    assert (found["bench"], found["ranks"], found["nodes"], found["ep"]) == ("dispatch", 2, 1, 2)
    assert found["chip"]
    assert found["versions"]["torch"] == torch.__version__
    assert [row["dispatcher"] for row in found["dispatchers"]] == ["exact", "static"]
    for row in found["dispatchers"]:
        # 128 picks of 32 float32, half of them for the other rank, four passes.
        assert row["gb_per_s"] * row["seconds"] * 1e9 == pytest.approx(128 * 32 * 4 / 2 * 4)
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(128)
        assert row["gemm_share"] > 0
        assert row["dropped"] == 0


@pytest.mark.parametrize(("experts", "top_k", "ep"), [(6, 2, 4), (8, 9, 4), (8, 2, 8)])
def test_experts_that_do_not_split_are_refused(experts: int, top_k: int, ep: int) -> None:
    with pytest.raises(LayoutError):
        Sizes(64, 32, 8, experts, top_k, ep, 2.0).check(4)


def _link(span: str, name: str, size: int, rate: float) -> dict[str, Any]:
    return vars(links.Link(span, name, 2, size, 1.0, rate))  # type: ignore[arg-type]


def _left_by_acceptance(folder: Path) -> None:
    """Two nodes of two ranks; a training on one node and on both."""
    head = {"chip": "NVIDIA H100", "commit": "abc", "versions": {}, "date": "2026-11-21"}
    rows = [
        _link(span, name, size, rate * part)
        for span, rate in (("inside", 300.0), ("across", 40.0), ("world", 80.0))
        for name in links.COLLECTIVES
        for size, part in ((2 << 20, 1.0), (1 << 20, 0.5))
    ]
    alone = {"device": "cuda", "ranks_per_node": 2, "matmul_tflops": 2.0, "copy_gb_per_s": 9.0}
    results = {
        "links": alone | {"ranks": 4, "nodes": 2, "links": rows},
        "dispatch": {"dispatchers": [{"dispatcher": "exact"}]},
        "checkpoint": {"written_gb_per_s": 5.0, "read_gb_per_s": 7.0},
    }
    folder.mkdir()
    for name, values in results.items():
        (folder / f"{name}.json").write_text(json.dumps(head | values | {"bench": name}))
    for nodes, step in ((1, 0.010), (2, 0.016)):
        batch = 16 * nodes
        run = folder / f"tiny-{nodes}nodes"
        path = tiny.write(run, "dit", folder / "digits", data__global_batch=batch)
        tree = OmegaConf.load(path)
        OmegaConf.save(tree, run / "config.yaml")
        (run / "environment.json").write_text(json.dumps({"world": 2 * nodes}))
        seconds = [9.0, step, step / 2, step * 3]  # the first one is left out
        lines = [{"step_time": s, "memory_gb": 0.01 * (n + 1)} for n, s in enumerate(seconds)]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_a_report_holds_what_was_measured_beside_what_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETRAIN_SITE", str(tmp_path / "site"))
    folder = tmp_path / "17"
    _left_by_acceptance(folder)
    found = reports.report(folder)
    assert json.loads((folder / "report.json").read_text()) == found
    assert set(found) >= HEAD
    file = site.read(tmp_path / "site" / "links.json")
    assert (file.gpus_per_node, file.nodes, file.save_gb_per_s, file.load_gb_per_s) == (2, 2, 5, 7)
    assert file.inside is not None
    assert file.inside.all_to_all == 300  # of the largest size
    counted = planned.of_run(folder / "tiny-1nodes", 2)
    # 16 images in 10 ms on 2 ranks of 2 TFLOP/s.
    share = 16 / 0.010 * counted.flops / 2 / 2e12
    assert file.efficiency["tiny"].of_matmul == pytest.approx(share)
    one, two = found["weak_scaling"]
    assert (one["nodes"], two["nodes"], two["ranks"]) == (1, 2, 4)
    assert one["images_per_s"] == pytest.approx(1600)
    assert two["of_first"] == pytest.approx(0.010 / 0.016)
    one, two = found["step_seconds"]
    assert one["measured"] == one["planned"] == pytest.approx(0.010)
    assert one["error_%"] is None  # it gave the efficiency: no prediction
    assert two["planned"] == pytest.approx(0.010)
    assert two["error_%"] == pytest.approx(100 * (10 / 16 - 1))
    assert two["sheet"] > 0
    one, two = found["memory_gb"]
    assert one["measured"] == pytest.approx(0.04)
    assert one["planned"] == counted.plan.per_rank.total / 1e9


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("links.json", None, "cannot be read"),
        ("dispatch.json", "{", "no JSON"),
        ("checkpoint.json", '{"bench": "links"}', "not what"),
        ("tiny-2nodes/metrics.jsonl", '{"step_time": 1.0, "memory_gb": 1.0}\n', "two are the"),
    ],
)
def test_a_part_that_is_missing_or_broken_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, said: str
) -> None:
    monkeypatch.setenv("PRETRAIN_SITE", str(tmp_path / "site"))
    folder = tmp_path / "17"
    _left_by_acceptance(folder)
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(LinksError, match=said) as caught:
        reports.report(folder)
    assert name in str(caught.value)
    assert site.default() is None
