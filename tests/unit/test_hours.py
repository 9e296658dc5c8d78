"""Hours by hand: the arithmetic of a plan against numbers worked out on paper."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from parallel.chips import CHIPS, Chip
from parallel.links import COLLECTIVES
from parallel.mesh import Degrees
from parallel.remat import RematConfig
from pretrain.cluster import site
from pretrain.cluster.site import Efficiency, LinkFile, LinksError, Rates
from pretrain.models.dit import DiTConfig
from pretrain.models.families import ModelConfig
from pretrain.models.udit import UDiTConfig
from pretrain.planning import hours, macs, roofline
from pretrain.planning.layout import Layout
from pretrain.planning.parameters import parameters
from pretrain.planning.traffic import Traffic

# U-DiT-MoE of 10.2 B, R of the roofline on paper: h 576, 64 experts of C/2, top-4, at 8×8 only.
# 8.15 B are routed experts, 2.06 B are dense, 0.16 B of these belong to no block. An image sends 16
# layers · 64 tokens · 4 picks · 2304 channels · 2 bytes · 4 passes = 75.5 MB.
MOE = {"experts": 64, "top_k": 4, "hidden_ratio": 0.5, "stages": ["latent"]}
R = UDiTConfig(width=576, num_heads=16, moe=MOE)
# P has 24 experts of C in three stages, X is the flagship.
P = UDiTConfig(
    width=576,
    num_heads=16,
    moe={"experts": 24, "top_k": 2, "hidden_ratio": 1.0, "stages": ["enc2", "latent", "dec2"]},
)
X = UDiTConfig(
    width=768, head_dim=128, adaln_lora=8, learn_sigma=False, moe=MOE | {"hidden_ratio": 0.25}
)
H100 = CHIPS["h100"]


def of(sizes: Degrees, images: int, **changes: object) -> hours.Hours:
    layout = replace(Layout(sizes, precision="bf16", micro_batch=images), **changes)
    return hours.of(R, layout, 3600, hours.assumed(H100, sizes.world))


def moved(found: hours.Hours) -> dict[str, Traffic]:
    return {traffic.what: traffic for traffic in found.communication}


def seconds(found: hours.Hours, *whats: str) -> float:
    by = moved(found)
    return sum(by[what].seconds or 0.0 for what in whats)


DENSE = ("gathers of dense weights", "scatters of dense gradients")
EXPERTS = ("gathers of experts", "scatters of expert gradients")
REPLICAS = ("gradients between replicas", "weights between replicas")
TOKENS = "tokens to experts and back"


@pytest.mark.parametrize(
    ("cfg", "giga_macs", "milliseconds", "mfu"),
    [(P, 262, 3.73, 0.43), (R, 221, 3.19, 0.42), (X, 361, 4.79, 0.46)],
    ids="PRX",
)
def test_an_image_takes_what_it_takes_on_paper(
    cfg: UDiTConfig, giga_macs: float, milliseconds: float, mfu: float
) -> None:
    """Roofline of an H100: within 1 % of the time, half a point of the bound of MFU."""
    found = roofline.one_image(cfg, in_bf16(H100))
    total = macs.total(cfg, "merged")
    assert total / 1e9 == pytest.approx(giga_macs, abs=1)
    assert found * 1e3 == pytest.approx(milliseconds, rel=0.01)
    assert 6 * total / found / H100.bf16 == pytest.approx(mfu, abs=0.006)


def test_images_a_second_of_dense_models_are_those_on_paper() -> None:
    """DiT-XL/2 on an H200: 808 to 822 images/s; U-DiT-L beside it 0.93, and 1.05 if depthwise
    convolutions ran at twice the rate: within 3 %."""
    machine = in_bf16(CHIPS["h200"])
    one = roofline.one_image(DiTConfig(size="XL/2"), machine)
    assert 808 < 1 / one < 822
    other = UDiTConfig(size="L")
    assert one / roofline.one_image(other, machine) == pytest.approx(0.93, rel=0.03)
    faster = replace(machine, depthwise=2 * machine.depthwise)
    assert one / roofline.one_image(other, faster) == pytest.approx(1.05, rel=0.03)


def in_bf16(chip: Chip) -> roofline.Machine:
    return replace(roofline.of_chip(chip), fp8=None)


@pytest.mark.parametrize(
    ("cfg", "chip", "gain"),
    [
        (DiTConfig(size="XL/2"), "h200", 1.30),
        (DiTConfig(size="XL/2"), "h100", 1.20),
        (UDiTConfig(size="L"), "h200", 1.10),
        (UDiTConfig(size="L"), "h100", 1.05),
    ],
)
def test_fp8_gains_what_it_gains_on_paper(cfg: ModelConfig, chip: str, gain: float) -> None:
    """With only the cost of casts added: within 5 %."""
    bf16 = roofline.one_image(cfg, in_bf16(CHIPS[chip]))
    fp8 = roofline.one_image(cfg, roofline.of_chip(CHIPS[chip]))
    assert bf16 / fp8 == pytest.approx(gain, rel=0.05)


def test_seconds_of_one_block_by_hand() -> None:
    """DiT of one block, width 64, 4 tokens, hidden 256, bf16, on a machine of round figures."""
    cfg = DiTConfig(depth=1, width=64, num_heads=2, patch=4, input_size=8, num_classes=2)
    machine = roofline.Machine(products=1e6, depthwise=1e3, memory=1e5, peak=2e6)
    block, _, update = roofline.step(cfg, Layout(precision="bf16", micro_batch=3), machine)
    products = 3 * (6 * 64 * 64 + 4 * (4 * 64 * 64 + 2 * 64 * 256) + 2 * 4 * 4 * 64)
    assert block.products == pytest.approx(6 * products / 1e6)
    assert block.memory == pytest.approx(3 * 4 * 64 * roofline.DIT / 1e5)
    assert block.depthwise == 0
    assert block.binding == "products"
    assert update.memory == pytest.approx(36 * macs_parameters(cfg) / 1e5)
    full = Layout(precision="bf16", micro_batch=3, remat=RematConfig(mode="full"))
    again = roofline.step(cfg, full, machine)[0]
    assert again.products == pytest.approx(4 / 3 * block.products)
    assert again.memory == pytest.approx(4 / 3 * block.memory)


def macs_parameters(cfg: DiTConfig) -> int:
    return sum(parameter.numel for parameter in parameters(cfg))


def test_states_shared_in_a_node_move_what_paper_says() -> None:
    """2 nodes of 8, states shared inside a node, experts over its 8 ranks, 64 images a GPU: 204 ms
    of computing, 45 of dense weights, 13 of tokens, 113 between the nodes."""
    found = of(Degrees(dp_replicate=2, dp_shard=8, ep=8), 64)
    by = moved(found)
    # 1.90 B in blocks gathered twice in 2 bytes, 0.16 B once: 7.92 GB, 7/8 of it over a link.
    assert by["gathers of dense weights"].bytes == pytest.approx(6.93e9, rel=5e-3)
    # 2.06 B in 4 bytes: 8.24 GB, 7/8 of it. Together 14.1 GB in 44 ms at 320 GB/s.
    assert by["scatters of dense gradients"].bytes == pytest.approx(7.21e9, rel=5e-3)
    dense = [by[what] for what in DENSE]
    assert all(t.inside_node and t.gb_per_s == pytest.approx(320) for t in dense)
    assert seconds(found, *DENSE) == pytest.approx(0.0442, rel=1e-2)
    # 75.5 MB · 64 images = 4.83 GB, 7/8 of it: 4.2 GB in 13 ms.
    assert by[TOKENS].bytes == pytest.approx(4.23e9, rel=1e-3)
    assert by[TOKENS].seconds == pytest.approx(0.0132, rel=1e-2)
    # 10.21 B / 8 ranks in 4 bytes = 5.1 GB, of 2 replicas half: 2.55 GB there and the same back,
    # 57 ms each at 45 GB/s.
    for what in REPLICAS:
        assert by[what].bytes == pytest.approx(2.55e9, rel=5e-3)
        assert by[what].seconds == pytest.approx(0.0567, rel=1e-2)
        assert not by[what].inside_node
    assert not any("expert" in what and "token" not in what for what in by)  # one copy a replica
    compute = (found.compute_seconds or 0) - update(found)
    # the graph as executed, which on paper is merged
    executed = macs.total(R, "trained") / macs.total(R, "merged")
    assert 0.204 < compute < 0.204 * executed
    assert found.step_seconds == found.compute_seconds
    assert found.communication_seconds == pytest.approx(0.171, rel=1e-2)
    assert (found.binding, found.resource) == ("compute", "compute")
    assert found.hours == found.step_seconds  # 3600 steps
    assert found.gpu_hours == pytest.approx(16 * (found.hours or 0))
    assert found.cost is None
    assert found.hours_basis.startswith("assumed: products at 70 % of 989 TFLOP/s, memory 2.80")
    assert found.mfu == found.mfu_bound
    # 113 ms between the nodes, the update beside them: on paper 36 images of 3.2 ms.
    assert found.break_even == pytest.approx((0.1134 - update(found)) / (compute / 64), rel=0.01)
    assert 36 / executed * 0.9 < found.break_even < 36


def update(found: hours.Hours) -> float:
    return next(part.total for part in found.compute if part.stage == "update")


def test_fully_sharded_without_expert_ranks_is_bound_by_the_ring() -> None:
    """16 ranks share all: (10.05 B · 2 passes + 0.16 B) · 2 bytes and 10.21 B · 4 bytes, 15/16: on
    paper 77 GB, 225 ms, and 71 images a GPU until computing takes as long."""
    found = of(Degrees(dp_shard=16), 32)
    total = sum(traffic.bytes for traffic in found.communication)
    assert total == pytest.approx(77e9, rel=0.01)
    assert found.communication_seconds == pytest.approx(0.225, rel=0.01)
    assert (found.binding, found.resource) == ("gathers of experts", "network")
    assert found.step_seconds == found.communication_seconds
    executed = macs.total(R, "trained") / macs.total(R, "merged")
    assert 71 / executed < (found.break_even or 0) < 71
    assert of(Degrees(dp_shard=16), 80).binding == "compute"
    kept = of(Degrees(dp_shard=16), 32, reshard_after_forward=False)
    saved = (found.communication_seconds or 0) - (kept.communication_seconds or 0)
    assert saved == pytest.approx(10.05 * 2 * 15 / 16 / 340, rel=5e-3)  # one pass of the blocks


def test_experts_over_many_nodes_send_through_the_nic_what_leaves_the_node() -> None:
    """64 ranks, 16 images: 75.5 MB · 16 = 1.21 GB, 56/64 of it at 45 GB/s: 23 ms."""
    by = moved(of(Degrees(dp_shard=64, ep=64), 16))
    assert by[TOKENS].bytes == pytest.approx(1.057e9, rel=1e-3)
    assert by[TOKENS].seconds == pytest.approx(0.0235, rel=1e-2)
    assert by["gathers of dense weights"].gb_per_s == pytest.approx(300)  # a ring of 64


def test_a_ring_through_some_ranks_of_a_node_gets_their_nics() -> None:
    """4 copies of experts on 4 nodes of 8 with ep 4: a ring of 8 ranks has two in a node."""
    by = moved(of(Degrees(dp_shard=32, ep=4), 8))
    assert by["gathers of experts"].ranks == 8
    assert by["gathers of experts"].gb_per_s == pytest.approx(90)


def test_gathers_come_every_micro_batch_and_scatters_once() -> None:
    one, two = (moved(of(Degrees(dp_shard=16, ep=8), 16, accum=n)) for n in (1, 2))
    for what, factor in ((DENSE[0], 2), (DENSE[1], 1), (EXPERTS[1], 1), (TOKENS, 2)):
        assert two[what].bytes == pytest.approx(factor * one[what].bytes), what


def test_a_tensor_axis_sums_activations_and_shares_the_work() -> None:
    whole, cut = of(Degrees(dp_shard=8), 8), of(Degrees(dp_shard=4, tp=2), 16)
    products = [sum(part.products for part in found.compute) for found in (whole, cut)]
    assert products[0] < products[1] < 1.1 * products[0]  # routers and stems are not cut
    # channels of all blocks · tokens · 2 bytes · 16 images, 4 sums, 2 · 1/2 of it.
    channels = 4 * 1024 * 576 + 20 * 256 * 1152 + 16 * 64 * 2304 + 4 * 1024 * 1152
    assert moved(cut)["sums of activations"].bytes == channels * 2 * 16 * 4


def test_zero_sends_float32_and_says_so_by_kind() -> None:
    """DeepSpeed sums whole gradients in stages 1 and 2, the second every micro-batch."""
    sizes = Degrees(dp_shard=8)
    by = {n: moved(of(sizes, 8, accum=2, engine=f"zero{n}")) for n in (1, 2, 3)}
    dense = by[1]["gathers of dense weights"].bytes
    assert dense == pytest.approx(2.06e9 * 4 * 7 / 8, rel=5e-3)
    assert by[1]["sums of dense gradients"].bytes == pytest.approx(2 * dense)
    assert by[2]["sums of dense gradients"].bytes == pytest.approx(4 * dense)
    # every micro-batch: all weights forward, all but the 1 B that stay backward
    gathered = by[3]["gathers of weights"].bytes
    assert gathered == pytest.approx((10.21 * 2 - 1) * 1e9 * 4 * 2 * 7 / 8, rel=5e-3)
    scattered = by[3]["scatters of gradients"].bytes
    assert scattered == pytest.approx(10.21e9 * 4 * 2 * 7 / 8, rel=5e-3)


def test_a_price_gives_a_cost() -> None:
    layout, figures = Layout(precision="bf16", micro_batch=8), hours.assumed(H100, 1)
    free, dear = (hours.of(R, layout, 100, figures, price) for price in (0.0, 2.5))
    assert free.cost == 0
    assert dear.cost == pytest.approx(2.5 * (dear.gpu_hours or 0))


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
    found = hours.of(R, layout, 1, own)
    assert found.compute_seconds == pytest.approx(6 * macs.total(R, "published") * 64 / 360e12)
    rates = {what: traffic.gb_per_s for what, traffic in moved(found).items()}
    assert rates["gathers of dense weights"] == pytest.approx(70)
    assert rates["gathers of experts"] == pytest.approx(20)
    assert rates["tokens to experts and back"] == pytest.approx(200)


def test_a_link_that_was_not_measured_gives_no_hours_but_a_reason() -> None:
    figures = FILE.model_copy(update={"nodes": 1, "across": None, "world": None}).figures(7)
    assert figures is not None
    sizes = Degrees(dp_shard=8, ep=4)
    found = hours.of(R, Layout(sizes), 1, figures)
    assert found.hours is None
    assert found.step_seconds is None
    assert "dp_shard" in found.hours_basis
    assert "more nodes" in found.hours_basis


def test_static_buffers_travel_whole() -> None:
    sizes, figures = Degrees(dp_shard=8, ep=8), hours.assumed(H100, 8)
    roomy = UDiTConfig(width=576, num_heads=16, moe=MOE | {"dispatcher": "static", "capacity": 2})
    one, two = (moved(hours.of(cfg, Layout(sizes), 1, figures)) for cfg in (R, roomy))
    assert two[TOKENS].bytes == 2 * one[TOKENS].bytes


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
