"""What a model costs, counted from the model itself before anything is allocated.

The model is built on meta and run once: parameters are those it has, MACs those of the operators it
calls (attention included), activations those autograd keeps. Not here: seconds, and where the
layout comes from.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from parallel.errors import LayoutError
from pretrain.models.build import Model, ModelConfig, build_form
from pretrain.models.layers import Block, PositionTable
from pretrain.models.moe import Experts, MoEConfig, moe_layers
from pretrain.models.rep import Form
from pretrain.models.udit import UDiTConfig

MIN_TOKENS = 8192  # per expert and step, below which experts see too little
MIN_ROWS = 512  # per local expert and micro-batch, below which its matrix products are too thin
_MASTER = 4  # bytes of a master weight, a gradient, a moment, an EMA value: all float32
_PASSES = 4  # of the all-to-all: dispatch and combine, forward and backward
_BYTES = {"fp32": 4, "bf16": 2}

ACTIVATIONS = (
    "what autograd keeps of one micro-batch, counted on meta for one image times micro_batch: "
    "eager, no recomputation, no workspace of kernels or collectives"
)


class Layout(BaseModel):
    """The degrees and sizes that decide what one rank holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    dp_replicate: PositiveInt = 1  # ranks that hold the same shard
    dp_shard: PositiveInt = 1  # ranks that share one copy
    tp: PositiveInt = 1  # tensor-parallel ranks
    ep: PositiveInt = 1  # expert-parallel ranks, folded over dp_shard·tp
    precision: Literal["fp32", "bf16"] = "fp32"  # of gathered weights and activations
    micro_batch: PositiveInt = 1  # images a rank and micro-batch
    accum: PositiveInt = 1  # micro-batches a step
    reshard_after_forward: bool = True  # free gathered weights between forward and backward

    @property
    def data(self) -> int:
        """Ranks that read different images."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        return self.data * self.tp

    @property
    def edp(self) -> int:
        """Ranks of one replica that hold the same experts."""
        return self.dp_shard * self.tp // self.ep

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.data * self.accum


@dataclass(frozen=True)
class PerRank:
    """Bytes on the fullest rank."""

    weights: int  # master weights, float32, sharded
    grads: int  # float32, sharded
    optimizer: int  # two Adam moments, float32, sharded
    ema: int  # one EMA, float32, sharded
    gathered: int  # weights gathered for compute: all, or two blocks and the root
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
    model, executed = _counted("trained", cfg, layout.precision)
    cost = merged = executed
    if isinstance(cfg, UDiTConfig):
        _, cost = _counted("published", cfg, layout.precision)
        _, merged = _counted("merged", cfg, layout.precision)
    total = sum(p.numel() for p in model.parameters())
    idle = sum(
        p.numel() * (layer.cfg.experts - layer.cfg.top_k) // layer.cfg.experts
        for layer in moe_layers(model)
        for p in layer.experts.parameters()
    )
    # why: the published activated counts of DiT-MoE hold the frozen position table, their
    # totals do not.
    tables = sum(m.table.numel() for m in model.modules() if isinstance(m, PositionTable))
    rows = tuple(_rows(model, cost, merged, layout, moe))
    return Plan(
        params_total=total,
        params_active=total - idle + tables if idle else total,
        params_active_trainable=total - idle,
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
    which saves 0.2 (L) to 0.7 % (S) of the published graph.
    """
    _, cost = _counted("trained", cfg, "fp32")
    return 6 * cost.macs


def _check(layout: Layout, moe: MoEConfig | None) -> None:
    ranks = layout.dp_shard * layout.tp
    if ranks % layout.ep:
        raise LayoutError(
            f"ep={layout.ep} must divide dp_shard·tp={ranks}; lower ep, or raise dp_shard"
        )
    if moe is not None and moe.experts % layout.ep:
        raise LayoutError(
            f"ep={layout.ep} must divide moe.experts={moe.experts}; change one of the two"
        )


@dataclass
class _Unit:
    """One run of a block, or of everything around the blocks."""

    macs: int = 0
    saved: int = 0  # bytes autograd keeps
    tokens: int = 0
    width: int = 0


@dataclass
class _Cost:
    """Of one image."""

    units: dict[str, _Unit] = field(default_factory=dict)  # by name of the block, in order
    rest: _Unit = field(default_factory=_Unit)

    @property
    def macs(self) -> int:
        return self.rest.macs + sum(unit.macs for unit in self.units.values())

    @property
    def saved(self) -> int:
        return self.rest.saved + sum(unit.saved for unit in self.units.values())


@lru_cache(maxsize=8)
def _counted(form: Form, cfg: ModelConfig, precision: str) -> tuple[Model, _Cost]:
    """A model on meta, and what a forward of one image costs."""
    with torch.device("meta"):
        model = build_form(cfg, form)
        if precision == "bf16":
            model.to(torch.bfloat16)
            for router in model.routers():
                router.float()
        fixed = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        cost, kinds = _Cost(), {}
        names = {id(module): name for name, module in model.named_modules()}
        for block in (m for m in model.modules() if isinstance(m, Block)):
            entry = cost.units.setdefault(names[id(block)], _Unit())
            _count_block(block, entry, kinds, fixed)
        x_t = torch.empty(1, cfg.in_channels, cfg.input_size, cfg.input_size)
        label = torch.zeros(1, dtype=torch.int64)
        saved = _Saved(fixed)
        with FlopCounterMode(display=False) as flops, saved.counting():
            model(x_t, torch.empty(1), label)
    ran_inside = sum(entry.macs for entry, _ in kinds.values())
    cost.rest = _Unit(flops.get_total_flops() // 2 - ran_inside, saved.bytes)
    return model, cost


def _count_block(block: nn.Module, entry: _Unit, kinds: dict[Any, Any], fixed: set[int]) -> None:
    """Make a block count itself when called; equal blocks are run once and looked up after."""
    run = block.forward
    shape = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())

    def forward(x: Tensor, *args: Any) -> Any:
        kind = (shape, tuple(x.shape))
        if kind not in kinds:
            saved = _Saved(fixed)
            with FlopCounterMode(display=False) as flops, saved.counting():
                out = run(x, *args)
            macs = flops.get_total_flops() // 2
            done = _Unit(macs, saved.bytes, math.prod(x.shape[1:-1]), x.shape[-1])
            kinds[kind] = (done, out)
        done, out = kinds[kind]
        vars(entry).update(vars(done))
        return out

    block.forward = forward  # type: ignore[method-assign]


class _Saved:
    """Bytes that autograd keeps, each storage once, weights and tables not."""

    def __init__(self, fixed: set[int]) -> None:
        self._fixed = fixed
        self._kept: dict[int, Tensor] = {}

    def counting(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._fixed:
            # why: kept alive, so that no later storage gets the same number.
            self._kept[_storage(tensor)] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _per_rank(model: Model, cost: _Cost, layout: Layout) -> PerRank:
    experts = _expert_params(model)
    shard = sum(_shard(p, id(p) in experts, layout) for p in model.parameters())
    held = [
        sum(_gathered(p, id(p) in experts, layout) for p in u.parameters()) for u in model.units()
    ]
    whole = sum(_gathered(p, id(p) in experts, layout) for p in model.parameters())
    if layout.reshard_after_forward:
        # why: FSDP gathers one block ahead, and never frees the root between forward and backward.
        whole = whole - sum(held) + sum(sorted(held)[-2:])
    sizes = {
        "weights": shard * _MASTER,
        "grads": shard * _MASTER,
        "optimizer": 2 * shard * _MASTER,
        "ema": shard * _MASTER,
        "gathered": whole * _BYTES[layout.precision],
        "activations": cost.saved * layout.micro_batch // layout.tp,
    }
    return PerRank(**sizes, total=sum(sizes.values()))


def _expert_params(model: Model) -> set[int]:
    return {id(p) for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}


def _shard(param: Tensor, expert: bool, layout: Layout) -> int:
    """Values of a parameter on rank 0: dim 0 cut as FSDP2 cuts it, in chunks of rounded-up size."""
    rows, size = param.shape[0], param.numel() // param.shape[0]
    if expert:
        return math.ceil(rows // layout.ep / (layout.edp * layout.dp_replicate)) * size
    return math.ceil(math.ceil(rows / layout.data) * size / layout.tp)


def _gathered(param: Tensor, expert: bool, layout: Layout) -> int:
    return param.numel() // (layout.ep if expert else layout.tp)


def _rows(
    model: Model, cost: _Cost, merged: _Cost, layout: Layout, moe: MoEConfig | None
) -> Iterator[Row]:
    names = list(dict.fromkeys(name.split(".")[0] for name in cost.units))
    left = sum(p.numel() for p in model.parameters())
    for name in names:
        units = [unit for key, unit in cost.units.items() if key.split(".")[0] == name]
        others = [unit for key, unit in merged.units.items() if key.split(".")[0] == name]
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
            all_to_all_bytes=picks * width * _BYTES[layout.precision] * layers * _PASSES,
            tokens_per_expert=share * layout.global_batch,
            rows_per_expert=share * layout.micro_batch * max(1, layout.ep // layout.tp),
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
                f"or ep from {layout.ep}"
            )
    owners = layout.edp * layout.dp_replicate
    if moe is not None and (moe.experts // layout.ep) % owners:
        yield (
            f"{moe.experts // layout.ep} experts a layer do not divide over {owners} ranks: dim 0 "
            f"is cut into chunks of {math.ceil(moe.experts // layout.ep / owners)}, so some ranks "
            "hold fewer"
        )
