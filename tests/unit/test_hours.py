"""Hours by hand: the arithmetic of a plan against numbers worked out on paper."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from parallel.links import COLLECTIVES
from parallel.mesh import Degrees
from pretrain import hours
from pretrain.cluster import site
from pretrain.cluster.site import Efficiency, LinkFile, LinksError, Rates
from pretrain.plan import Layout, PerRank, Plan, Row

# A U-DiT-MoE of 10.2 B: h 576, 64 experts of C/2, top-4, at 8×8 only. 8.15 B are routed experts,
# 2.06 B are dense, 0.16 B of these belong to no block. An image sends 16 layers · 64 tokens ·
# 4 picks · 2304 channels · 2 bytes · 4 passes = 75.5 MB.
EXPERTS, DENSE, REST = 8.15e9, 2.06e9, 0.16e9
IMAGE = 16 * 64 * 4 * 2304 * 2 * 4


def plan_of(sizes: Degrees) -> Plan:
    stage = Row("latent", 16, 64, 2304, int(DENSE + EXPERTS - REST), 0, 0, 16, IMAGE, 0.0, 0.0)
    rest = Row("rest", 0, 0, 0, int(REST), 0, 0, 0, 0, 0.0, 0.0)
    total = int(DENSE + EXPERTS)
    weights = 4 * total // sizes.dp_shard
    return Plan(
        params_total=total,
        params_active=0,
        params_active_trainable=0,
        params_experts=int(EXPERTS),
        macs_forward=0,
        macs_forward_merged=0,
        flops_train_per_image=int(1.32e12),
        per_rank=PerRank(weights, weights, 2 * weights, weights, 0, 0, 0),
        stages=(stage, rest),
        activations_basis="",
        warnings=(),
    )


def of(sizes: Degrees, images: int, **changes: object) -> hours.Hours:
    layout = replace(Layout(sizes, precision="bf16", micro_batch=images), **changes)
    return hours.of(plan_of(sizes), layout, 3600, hours.assumed(989e12, sizes.world))


def moved(found: hours.Hours) -> dict[str, hours.Traffic]:
    return {traffic.what: traffic for traffic in found.communication}


def test_states_shared_in_a_node_move_what_paper_says() -> None:
    """2 nodes of 8, states shared inside a node, experts over its 8 ranks, 64 images a GPU."""
    found = of(Degrees(dp_replicate=2, dp_shard=8, ep=8), 64)
    by = moved(found)
    # 1.90 B in blocks gathered twice in 2 bytes, 0.16 B once: 7.92 GB, 7/8 of it over a link.
    assert by["gathers of dense weights"].bytes == pytest.approx(6.93e9, rel=1e-3)
    # 2.06 B in 4 bytes: 8.24 GB, 7/8 of it. Together 14.1 GB in 44 ms at 320 GB/s.
    assert by["scatters of dense gradients"].bytes == pytest.approx(7.21e9, rel=1e-3)
    dense = [by["gathers of dense weights"], by["scatters of dense gradients"]]
    assert all(traffic.inside_node and traffic.gb_per_s == 320 for traffic in dense)
    assert sum(traffic.seconds or 0 for traffic in dense) == pytest.approx(0.0442, rel=1e-2)
    # 75.5 MB · 64 images = 4.83 GB, 7/8 of it: 4.2 GB in 13 ms.
    assert by["tokens to experts and back"].bytes == pytest.approx(4.23e9, rel=1e-3)
    assert by["tokens to experts and back"].seconds == pytest.approx(0.0132, rel=1e-2)
    # 10.21 B / 8 ranks in 4 bytes = 5.1 GB, of 2 replicas half: 2.55 GB there and the same back,
    # 57 ms each at 45 GB/s.
    for what in ("gradients between replicas", "weights between replicas"):
        assert by[what].bytes == pytest.approx(2.55e9, rel=2e-3)
        assert by[what].seconds == pytest.approx(0.0567, rel=1e-2)
        assert not by[what].inside_node
    assert not any("expert" in what and "token" not in what for what in by)  # one copy a replica
    # 1.32 TFLOP · 64 images at 0.4 · 989 TFLOP/s: 214 ms, longer than 44 + 13 + 113 = 171 ms.
    assert found.compute_seconds == found.step_seconds == pytest.approx(0.2135, rel=1e-3)
    assert found.communication_seconds == pytest.approx(0.171, rel=5e-3)
    assert found.binding == "compute"
    assert found.hours == found.step_seconds  # 3600 steps
    assert found.gpu_hours == pytest.approx(16 * 0.2135, rel=1e-3)
    assert found.hours_basis.startswith("assumed: 40 % of 989 TFLOP/s, NVLink 320 GB/s, NIC 45")


def test_fully_sharded_without_expert_ranks_is_bound_by_the_ring() -> None:
    """16 ranks share all: (10.05 B · 2 passes + 0.16 B) · 2 bytes and 10.21 B · 4 bytes, 15/16."""
    found = of(Degrees(dp_shard=16), 64)
    total = sum(traffic.bytes for traffic in found.communication)
    assert total == pytest.approx((40.52e9 + 40.84e9) * 15 / 16, rel=1e-3)  # 76 GB
    assert found.communication_seconds == pytest.approx(0.224, rel=5e-3)  # at 340 GB/s
    assert found.binding == "gathers of experts"
    assert found.step_seconds == found.communication_seconds
    kept = of(Degrees(dp_shard=16), 64, reshard_after_forward=False)
    saved = found.communication_seconds - (kept.communication_seconds or 0)
    assert saved == pytest.approx(10.05 * 2 * 15 / 16 / 340, rel=1e-3)  # one pass of the blocks


def test_experts_over_many_nodes_send_through_the_nic_what_leaves_the_node() -> None:
    """64 ranks, 16 images: 75.5 MB · 16 = 1.21 GB, 56/64 of it at 45 GB/s: 23 ms."""
    by = moved(of(Degrees(dp_shard=64, ep=64), 16))
    tokens = by["tokens to experts and back"]
    assert tokens.bytes == pytest.approx(1.057e9, rel=1e-3)
    assert tokens.seconds == pytest.approx(0.0235, rel=1e-2)
    assert by["gathers of dense weights"].gb_per_s == pytest.approx(300)  # a ring of 64


def test_a_ring_through_some_ranks_of_a_node_gets_their_nics() -> None:
    """4 copies of experts on 4 nodes of 8 with ep 4: a ring of 8 ranks has two in a node."""
    by = moved(of(Degrees(dp_shard=32, ep=4), 8))
    assert by["gathers of experts"].ranks == 8
    assert by["gathers of experts"].gb_per_s == 90


def test_gathers_come_every_micro_batch_and_scatters_once() -> None:
    one, two = (moved(of(Degrees(dp_shard=16, ep=8), 16, accum=n)) for n in (1, 2))
    for what, factor in (
        ("gathers of dense weights", 2),
        ("scatters of dense gradients", 1),
        ("scatters of expert gradients", 1),
        ("tokens to experts and back", 2),
    ):
        assert two[what].bytes == pytest.approx(factor * one[what].bytes), what


def test_a_tensor_axis_sums_activations_and_shares_the_work() -> None:
    whole, cut = of(Degrees(dp_shard=8), 8), of(Degrees(dp_shard=4, tp=2), 16)
    assert cut.compute_seconds == whole.compute_seconds
    # 16 blocks · 64 tokens · 2304 channels · 2 bytes · 16 images, 4 sums, 2 · 1/2 of it.
    assert moved(cut)["sums of activations"].bytes == 16 * 64 * 2304 * 2 * 16 * 4


FILE = LinkFile(
    chip="NVIDIA H100 80GB HBM3",
    device="cuda",
    gpus_per_node=4,
    nodes=2,
    date="2026-11-21",
    commit="0123456789",
    inside=Rates(**dict.fromkeys(COLLECTIVES, 200.0)),
    across=Rates(**dict.fromkeys(COLLECTIVES, 20.0)),
    world=Rates(**dict.fromkeys(COLLECTIVES, 70.0)),
    matmul_tflops=600.0,
    copy_gb_per_s=2000.0,
    efficiency={
        "good": Efficiency(flops_per_image=7, of_matmul=0.6),
        "bad": Efficiency(flops_per_image=8, of_matmul=0.5),
    },
    save_gb_per_s=5.0,
    load_gb_per_s=9.0,
)


def test_measured_figures_replace_the_assumed_ones() -> None:
    own, other = FILE.figures(7), FILE.figures(9)
    assert own is not None
    assert other is not None
    assert own.flops == pytest.approx(0.6 * 600e12)
    assert "measured on 2026-11-21, 2 nodes, NVIDIA H100 80GB HBM3, commit 01234567" in own.basis
    assert "another model" not in own.basis
    assert other.flops == pytest.approx(0.5 * 600e12)  # of the worst
    assert "another model, bad" in other.basis
    sizes = Degrees(dp_shard=8, ep=4)  # 2 nodes of 4
    layout = Layout(sizes, precision="bf16", micro_batch=64)
    found = hours.of(plan_of(sizes), layout, 1, own)
    assert found.compute_seconds == pytest.approx(1.32e12 * 64 / 360e12)
    rates = {what: traffic.gb_per_s for what, traffic in moved(found).items()}
    assert rates["gathers of dense weights"] == pytest.approx(70)
    assert rates["gathers of experts"] == pytest.approx(20)
    assert rates["tokens to experts and back"] == pytest.approx(200)


def test_a_link_that_was_not_measured_gives_no_hours_but_a_reason() -> None:
    figures = FILE.model_copy(update={"nodes": 1, "across": None, "world": None}).figures(7)
    assert figures is not None
    sizes = Degrees(dp_shard=8, ep=4)
    found = hours.of(plan_of(sizes), Layout(sizes), 1, figures)
    assert found.hours is None
    assert found.step_seconds is None
    assert "dp_shard" in found.hours_basis
    assert "more nodes" in found.hours_basis


def test_static_buffers_travel_whole() -> None:
    sizes = Degrees(dp_shard=8, ep=8)
    figures, layout = hours.assumed(989e12, 8), Layout(sizes)
    plain, roomy = (hours.of(plan_of(sizes), layout, 1, figures, room=r) for r in (1.0, 2.0))
    what = "tokens to experts and back"
    assert moved(roomy)[what].bytes == 2 * moved(plain)[what].bytes


def test_a_link_file_survives_and_a_broken_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETRAIN_SITE", str(tmp_path / "site"))
    assert site.default() is None
    path = site.write(FILE)
    assert site.default() == path == tmp_path / "site" / "links.json"
    assert site.read(path) == FILE
    whole = path.read_text()
    for text, said in (
        (whole[:-20], "JSON"),
        (whole.replace('"format": 1', '"format": 2'), "format"),
        (whole.replace('"chip"', '"chop"'), "ch.p"),
        (whole.replace('"nodes": 2', '"nodes": "two"'), "nodes"),
        (whole.replace("600.0", "-1.0"), "matmul_tflops"),
    ):
        assert text != whole
        path.write_text(text)
        with pytest.raises(LinksError, match=said) as caught:
            site.read(path)
        assert str(path) in str(caught.value)
        assert "acceptance.sh" in str(caught.value)
    with pytest.raises(LinksError, match="cannot be read"):
        site.read(tmp_path / "nothing.json")


def test_traffic_is_plain_data() -> None:
    rows = asdict(of(Degrees(dp_shard=16, ep=8), 64))["communication"]
    assert {"what", "axis", "ranks", "inside_node", "bytes", "gb_per_s", "seconds"} == set(rows[0])
