"""What a model costs, counted from the model itself before anything is allocated.

Parameters are those the model on meta has, MACs and activations those `counting` finds, shares of a
rank the arithmetic of the cuts. Not here: seconds, and where the layout comes from.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from parallel import fsdp, tensor
from parallel.errors import LayoutError
from parallel.mesh import Degrees
from parallel.precision import COMPUTE, Precision
from parallel.remat import RematConfig
from pretrain.counting import Cost, counted
from pretrain.models.build import Model, ModelConfig
from pretrain.models.layers import Block, PositionTable
from pretrain.models.moe import MoEConfig, moe_layers
from pretrain.models.udit import UDiTConfig

MIN_TOKENS = 8192  # per expert and step, below which experts see too little
MIN_ROWS = 512  # per local expert and micro-batch, below which its matrix products are too thin
_MASTER = 4  # bytes of a master weight, a gradient, a moment, an EMA value: all float32
_PASSES = 4  # of the all-to-all: dispatch and combine, forward and backward

ACTIVATIONS = (
    "what autograd keeps of one micro-batch at its peak, counted on meta for one image times "
    "micro_batch: eager, remat as configured, flash attention, tensor parallelism not subtracted, "
    "no workspace of kernels or collectives"
)


@dataclass(frozen=True)
class Layout:
    """The degrees and sizes that decide what one rank holds."""

    sizes: Degrees = Degrees()
    precision: Precision = "fp32"  # of gathered weights and activations
    micro_batch: int = 1  # images a rank and micro-batch
    accum: int = 1  # micro-batches a step
    reshard_after_forward: bool = True  # free gathered weights between forward and backward
    unit_bytes: int = 0  # neighbouring blocks below this together are gathered as one
    remat: RematConfig = RematConfig()
    averages: int = 1  # EMAs of the weights

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.sizes.data * self.accum


@dataclass(frozen=True)
class PerRank:
    """Bytes on rank 0."""

    weights: int  # master weights, float32, sharded
    grads: int  # float32, sharded
    optimizer: int  # two Adam moments, float32, sharded
    ema: int  # all EMAs, float32, sharded
    gathered: int  # weights gathered for compute: all, or two units and the root
    activations: int  # see ACTIVATIONS
    total: int


@dataclass(frozen=True)
class Row:
    """One stage of the model; the row `rest` is what belongs to none."""

    name: str
    blocks: int  # transformer blocks, the two of a U-DiT block counted apart
    tokens: int  # an image; 0 for rest
    width: int  # channels of a token; 0 for rest
    params: int
    macs: int  # forward, an image
    macs_merged: int
    moe_layers: int
    all_to_all_bytes: int  # an image: dispatch and combine, forward and backward
    tokens_per_expert: float  # a layer and step
    rows_per_expert: float  # a local expert of a layer and micro-batch


@dataclass(frozen=True)
class Plan:
    """What a run of a model on a layout needs."""

    params_total: int  # trainable
    params_active: int  # as published for MoE: fixed positions counted, unchosen experts not
    params_active_trainable: int  # the trainable ones among them
    params_experts: int  # of all routed experts
    macs_forward: int  # an image, the published trained graph
    macs_forward_merged: int  # the same after merging
    flops_train_per_image: int  # 2 × MACs × 3
    per_rank: PerRank
    stages: tuple[Row, ...]
    activations_basis: str
    warnings: tuple[str, ...]


def plan(cfg: ModelConfig, layout: Layout) -> Plan:
    """Count a model on a layout. Raises LayoutError when ep does not fit the world or experts."""
    moe: MoEConfig | None = getattr(cfg, "moe", None)
    _check(layout, moe)
    model, executed = counted("trained", cfg, layout.precision)
    cost = merged = executed
    if isinstance(cfg, UDiTConfig):
        _, cost = counted("published", cfg, layout.precision)
        _, merged = counted("merged", cfg, layout.precision)
    total = sum(p.numel() for p in model.parameters())
    experts = [
        (p.numel(), layer.cfg) for layer in moe_layers(model) for p in layer.experts.parameters()
    ]
    idle = sum(size * (of.experts - of.top_k) // of.experts for size, of in experts)
    # why: the published activated counts of DiT-MoE hold the frozen position table, their
    # totals do not.
    tables = sum(m.table.numel() for m in model.modules() if isinstance(m, PositionTable))
    rows = tuple(_rows(model, cost, merged, layout, moe))
    return Plan(
        params_total=total,
        params_active=total - idle + tables if idle else total,
        params_active_trainable=total - idle,
        params_experts=sum(size for size, _ in experts),
        macs_forward=cost.macs,
        macs_forward_merged=merged.macs,
        flops_train_per_image=6 * cost.macs,
        per_rank=_per_rank(model, executed, layout),
        stages=rows,
        activations_basis=ACTIVATIONS,
        warnings=tuple(_warnings(rows, layout, moe)),
    )


def flops_per_image(cfg: ModelConfig) -> int:
    """FLOPs of training on one image: 2 a MAC, three times the forward that is executed.

    Not above `Plan.flops_train_per_image`: U-DiT's parallel depthwise kernels are applied as one,
    and pairs of 1×1 convolutions as one where the tokens of an image pay for it. More images in a
    micro-batch merge more pairs, which is not counted here.
    """
    _, cost = counted("trained", cfg, "fp32")
    return 6 * cost.macs


def _check(layout: Layout, moe: MoEConfig | None) -> None:
    if moe is not None and moe.experts % layout.sizes.ep:
        raise LayoutError(
            f"ep={layout.sizes.ep} must divide moe.experts={moe.experts}; change one of the two"
        )


def _per_rank(model: Model, cost: Cost, layout: Layout) -> PerRank:
    shares = _Shares(model, layout.sizes)
    weights = {id(p): shares.sharded(p) for p in model.parameters()}
    own = sum(shares.owned(n) for n in weights.values())
    shard = sum(weights.values())
    item = COMPUTE[layout.precision].itemsize
    whole = sum(shares.gathered(p) for p in model.parameters())
    if layout.reshard_after_forward:
        units = [
            sum(shares.gathered(p) for p in module_parameters(group))
            for group in fsdp.groups(model.units(), layout.unit_bytes, item)
        ]
        # why: FSDP gathers one unit ahead, and never frees the root between forward and backward.
        whole = whole - sum(units) + sum(sorted(units)[-2:])
    sizes = {
        "weights": shard * _MASTER,
        # why: replicas reduce into the part they own, beside the gradient of the whole shard.
        "grads": (shard + (own if layout.sizes.dp_replicate > 1 else 0)) * _MASTER,
        "optimizer": 2 * own * _MASTER,
        "ema": layout.averages * own * _MASTER,
        "gathered": whole * item,
        "activations": activations(model, cost, layout.remat) * layout.micro_batch,
    }
    return PerRank(**sizes, total=sum(sizes.values()))


def module_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


def activations(model: Model, cost: Cost, remat: RematConfig) -> int:
    """Bytes autograd keeps of one image, at the peak.

    A unit that recomputes keeps what enters it and what is never recomputed; while it is recomputed
    everything of that one unit stands.
    """
    names = {id(module): name for name, module in model.named_modules()}
    total, most = cost.rest.saved, 0
    for index, unit in enumerate(model.units()):
        blocks = [cost.blocks[names[id(m)]] for m in unit.modules() if isinstance(m, Block)]
        saved = sum(block.saved for block in blocks)
        if remat.mode == "none" or (index + 1) % remat.every:
            total += saved
            continue
        kept = blocks[0].entering + sum(block.kept[remat.mode] for block in blocks)
        total += kept
        most = max(most, saved - min(saved, kept))
    return total + most


class _Shares:
    """How many values of a parameter rank 0 holds: the arithmetic of the cuts, without a mesh."""

    def __init__(self, model: Model, sizes: Degrees) -> None:
        self._sizes = sizes
        self._cuts = tensor.cuts(model) if sizes.tp > 1 else {}
        modules = [layer.experts for layer in moe_layers(model)]
        self._experts = {id(p) for p in module_parameters(modules)}

    def gathered(self, parameter: Tensor) -> int:
        """Values that a rank computes with."""
        return math.prod(self._local(parameter))

    def sharded(self, parameter: Tensor) -> int:
        """Values after FSDP2's cut: of dim 0 in chunks of rounded-up size, of experts evenly."""
        local = self._local(parameter)
        expert = id(parameter) in self._experts
        ranks = self._sizes.edp if expert else self._sizes.dp_shard
        if expert and any(size % ranks == 0 for size in local):
            return math.prod(local) // ranks
        return math.ceil(local[0] / ranks) * math.prod(local[1:])

    def owned(self, sharded: int) -> int:
        """Of these, what the first replica owns."""
        return sharded // self._sizes.dp_replicate

    def _local(self, parameter: Tensor) -> list[int]:
        local = list(parameter.shape)
        if id(parameter) in self._experts:
            local[0] //= self._sizes.ep
        elif id(parameter) in self._cuts:
            local[self._cuts[id(parameter)]] //= self._sizes.tp
        return local


def _rows(
    model: Model, cost: Cost, merged: Cost, layout: Layout, moe: MoEConfig | None
) -> Iterator[Row]:
    names = list(dict.fromkeys(name.split(".")[0] for name in cost.blocks))
    left = sum(p.numel() for p in model.parameters())
    for name in names:
        units = [unit for key, unit in cost.blocks.items() if key.split(".")[0] == name]
        others = [unit for key, unit in merged.blocks.items() if key.split(".")[0] == name]
        params = sum(p.numel() for p in model.get_submodule(name).parameters())
        left -= params
        layers = len(moe_layers(model.get_submodule(name)))
        tokens, width = units[0].tokens, units[0].width
        picks = tokens * moe.top_k if moe and layers else 0  # an image and layer
        share = picks / moe.experts if moe else 0.0
        yield Row(
            name=name,
            blocks=len(units),
            tokens=tokens,
            width=width,
            params=params,
            macs=sum(unit.macs for unit in units),
            macs_merged=sum(unit.macs for unit in others),
            moe_layers=layers,
            all_to_all_bytes=picks * width * COMPUTE[layout.precision].itemsize * layers * _PASSES,
            tokens_per_expert=share * layout.global_batch,
            rows_per_expert=share * layout.micro_batch * layout.sizes.ep / layout.sizes.tp,
        )
    yield Row("rest", 0, 0, 0, left, cost.rest.macs, merged.rest.macs, 0, 0, 0.0, 0.0)


def _warnings(rows: tuple[Row, ...], layout: Layout, moe: MoEConfig | None) -> Iterator[str]:
    for row in rows:
        if moe is None or not row.moe_layers:
            continue
        if row.tokens_per_expert < MIN_TOKENS:
            batch = math.ceil(MIN_TOKENS * moe.experts / (row.tokens * moe.top_k))
            yield (
                f"{row.name}: {row.tokens_per_expert:.0f} tokens per expert per step, fewer than "
                f"{MIN_TOKENS}; raise the global batch from {layout.global_batch} to {batch}, or "
                f"lower moe.experts from {moe.experts}"
            )
        if row.rows_per_expert < MIN_ROWS:
            yield (
                f"{row.name}: {row.rows_per_expert:.0f} rows per local expert and micro-batch, "
                f"fewer than {MIN_ROWS}; raise micro_batch from {layout.micro_batch} "
                f"or ep from {layout.sizes.ep}"
            )
