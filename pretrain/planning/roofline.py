"""Seconds of a step on one device: every part of the model takes the time of its operations at the
rate that such operations reach, or of the bytes that it moves, whichever is its own.

Products run at a share of the chip's peak, depthwise convolutions at a rate of their own, the rest
of a block (norms, modulation, activations, residuals, rotary positions, permutation of rows) at the
rate of the memory: so many bytes a token and channel. The update moves bytes only. Source of the
rates and the bytes: a roofline on paper of U-DiT on H100, whose figures a test holds these against.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.chips import Chip
from pretrain.models.families import ModelConfig
from pretrain.planning import activations, macs
from pretrain.planning.anatomy import AROUND, Site, anatomy
from pretrain.planning.layout import Layout
from pretrain.planning.macs import Work
from pretrain.planning.shares import held

PRODUCTS = 0.70  # of the peak, that matrix products of training reach
MEMORY = 0.836  # of the data sheet's memory bandwidth, that element-wise kernels reach
DEPTHWISE = 0.0202  # of the peak: 20 TFLOP/s on an H100
# Element-wise bytes of forward and backward in bf16, a token and channel of a block, where norms,
# modulation and activations are fused into what stands beside them. ROW: of a row of an expert.
DIT, U_DIT, ROW = 96, 130, 65
# The same on a CPU: passes over a stream, counted by hand as if every operator read and wrote for
# itself. C kernels that join some took about as long where this was held to steps; with AVX-512
# they take less, and U-DiT is planned 11 to 19 % too slow. DiT: two modulated norms 40, gates and
# residuals 26, GELU 20, sums of the gradients of q, k and v 14. U-DiT beside that: rotary positions
# 54, lengths 24, phases 12, shortcuts and kernels 42, half the GELU.
DIT_APART, U_DIT_APART, ROW_APART = 2 * 100, 2 * 222, 2 * 40
# Bytes a parameter: AdamW reads weight, gradient, two moments, writes three; an average. Apart:
# the gradient's norm, FSDP's copies and the choice of skipped averages too.
ADAMW, EMA = 28, 8
ADAMW_APART, EMA_APART = 48, 24
# Bytes of a value that enters a product in FP8, or whose gradient does: read, cast, laid out twice.
CAST = 6.6
IN_FP8 = ("qkv", "out", "ffn", "shared", "experts")
SHARED = 0.5  # of a block's element-wise work, that a tensor axis shares


@dataclass(frozen=True)
class Machine:
    """What one device reaches."""

    products: float  # FLOP/s
    depthwise: float  # FLOP/s
    memory: float  # bytes/s
    peak: float  # FLOP/s that MFU is a share of
    fused: bool = True  # element-wise operators, into their neighbours
    fp8: float | None = None  # FLOP/s of products in FP8; None: the device has none


@dataclass(frozen=True)
class Seconds:
    """Of one stage of the model, a step and rank."""

    stage: str
    products: float
    depthwise: float
    memory: float

    @property
    def total(self) -> float:
        return self.products + self.depthwise + self.memory

    @property
    def binding(self) -> str:
        """What takes most of it."""
        named = {
            "products": self.products,
            "depthwise convolutions": self.depthwise,
            "memory": self.memory,
        }
        return max(named, key=lambda name: named[name])


def of_chip(chip: Chip) -> Machine:
    """What training reaches of a data sheet."""
    return Machine(
        products=PRODUCTS * chip.bf16,
        depthwise=DEPTHWISE * chip.bf16,
        memory=MEMORY * chip.memory_rate,
        peak=chip.bf16,
        fp8=None if chip.fp8 is None else PRODUCTS * chip.fp8,
    )


def measured(matmul: float, copied: float, *, fused: bool) -> Machine:
    """Of a device whose plain product and copy were measured. matmul: FLOP/s; copied: bytes/s."""
    return Machine(matmul, DEPTHWISE / PRODUCTS * matmul, copied, matmul, fused)


def step(cfg: ModelConfig, layout: Layout, machine: Machine) -> tuple[Seconds, ...]:
    """Of every stage in order, of what belongs to none, and of the update, which is named so."""
    found = [*_forward_and_backward(cfg, layout, machine)]
    return (
        *found,
        Seconds("update", 0.0, 0.0, _updated(cfg, layout, machine.fused) / machine.memory),
    )


def _forward_and_backward(cfg: ModelConfig, layout: Layout, machine: Machine) -> Iterator[Seconds]:
    whole = anatomy(cfg)
    form: macs.Form = "trained"
    works = macs.forward(cfg, form, layout.micro_batch, pairs=layout.pairs)
    for stage in (*whole.stages, AROUND):
        sites = [site for site in whole.sites if site.stage == stage]
        passes = _passes(layout, sites)
        own = [work for work in works if work.stage == stage]
        seconds = {kind: 0.0 for kind in ("products", "depthwise")}
        for work in own:
            kind = "depthwise" if work.kind == "depthwise" else "products"
            seconds[kind] += 2 * _cut(work, layout) * passes[kind] / _rate(work, layout, machine)
        moved = sum(elementwise(site, layout, machine.fused) for site in sites) * passes["memory"]
        if layout.precision == "fp8" and machine.fp8:
            moved += sum(_cast(site, layout) for site in sites)
        if stage == AROUND:
            moved = 3 * activations.around(cfg, layout.of_micro_batch(whole.moe))
        yield Seconds(
            stage,
            layout.accum * seconds["products"],
            layout.accum * seconds["depthwise"],
            layout.accum * moved / machine.memory,
        )


def _passes(layout: Layout, sites: list[Site]) -> dict[str, float]:
    """Forwards that a step costs, of products and convolutions; steps, of element-wise bytes."""
    remat = layout.remat
    again = sum((site.unit + 1) % remat.every == 0 for site in sites) / max(1, len(sites))
    again = 0.0 if remat.mode == "none" else again
    products = 3 + (again if remat.mode == "full" else 0.0)
    return {"products": products, "depthwise": products, "memory": 1 + again / 3}


def _rate(work: Work, layout: Layout, machine: Machine) -> float:
    """FLOP/s of one part."""
    if work.kind == "depthwise":
        return machine.depthwise
    in_fp8 = layout.precision == "fp8" and machine.fp8 and work.part in IN_FP8
    return machine.fp8 if in_fp8 and machine.fp8 else machine.products


def _cast(site: Site, layout: Layout) -> float:
    """Bytes that casts to FP8 move in a block: of what enters its products, and of gradients."""
    tokens, c = layout.micro_batch * site.tokens, site.width
    streams = {"mlp": 2, "swiglu": 2, "rep": 2, None: 0}[site.ffn]
    hidden = {"mlp": 2, "swiglu": 3, "rep": 2, None: 0}[site.ffn]
    values = tokens * ((6 + streams) * c + hidden * site.hidden)
    values += layout.micro_batch * site.picks * (2 * c + 3 * site.expert_width)
    return CAST * values / layout.sizes.tp


def _cut(work: Work, layout: Layout) -> float:
    return work.macs if work.whole else work.macs / layout.sizes.tp


def elementwise(site: Site, layout: Layout, fused: bool) -> float:
    """Bytes of a block's forward and backward, a micro-batch, beside its products."""
    wide = layout.item / 2
    dit, u_dit, row = (DIT, U_DIT, ROW) if fused else (DIT_APART, U_DIT_APART, ROW_APART)
    of_token = u_dit if site.windows > 1 else dit
    tokens = layout.micro_batch * site.tokens * site.width
    shared = (1 - SHARED) + SHARED / layout.sizes.tp
    rows = layout.micro_batch * site.picks * site.width / layout.sizes.tp
    return wide * (of_token * tokens * shared + row * rows)


def _updated(cfg: ModelConfig, layout: Layout, fused: bool) -> float:
    """Bytes of the update."""
    values = held(cfg, layout.sizes)
    own = values.part if layout.stage else values.own
    adamw, ema = (ADAMW, EMA) if fused else (ADAMW_APART, EMA_APART)
    return own * (adamw + ema * layout.averages)


def one_image(cfg: ModelConfig, machine: Machine, form: macs.Form = "merged") -> float:
    """Seconds of training on one image, without an update, of a graph in bf16, or in FP8 where the
    machine says so."""
    layout = Layout(precision="fp8" if machine.fp8 else "bf16")
    works, sites = macs.forward(cfg, form), anatomy(cfg).sites
    products = sum(6 * work.macs / _rate(work, layout, machine) for work in works)
    moved = sum(elementwise(site, layout, machine.fused) for site in sites)
    if machine.fp8:
        moved += sum(_cast(site, layout) for site in sites)
    return products + moved / machine.memory
