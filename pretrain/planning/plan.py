"""What a model on a layout needs, whole and by stage: parameters, multiply-adds, bytes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.models.families import ModelConfig
from pretrain.models.moe import MoEConfig
from pretrain.planning import activations, macs
from pretrain.planning.anatomy import AROUND, anatomy
from pretrain.planning.layout import Layout, check
from pretrain.planning.memory import PerRank, per_rank
from pretrain.planning.parameters import counted, parameters
from pretrain.planning.traffic import all_to_all

MIN_TOKENS = 8192  # per expert and step, below which experts see too little
MIN_ROWS = 512  # per local expert and micro-batch, below which its matrix products are too thin

ACTIVATIONS = (
    "what autograd keeps of one micro-batch at the fullest moment of backward, and the gradients "
    "that stand beside it: eager, remat and tensor parallelism as configured, flash attention"
)


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
    activations: int  # bytes of a micro-batch and rank, from forward to backward


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
    flops_executed_per_image: int  # the same of the graph that this program runs
    per_rank: PerRank
    stages: tuple[Row, ...]
    activations_basis: str
    warnings: tuple[str, ...]


def plan(cfg: ModelConfig, layout: Layout) -> Plan:
    """Raises LayoutError when ep does not fit the world or experts."""
    whole = anatomy(cfg)
    check(layout, whole.moe)
    total = counted(cfg)
    experts = sum(p.numel for p in parameters(cfg) if p.role == "expert")
    idle = 0
    if whole.moe is not None:
        idle = experts * (whole.moe.experts - whole.moe.top_k) // whole.moe.experts
    rows = tuple(_rows(cfg, layout))
    published = macs.total(cfg, "published")
    # why: the published activated counts of DiT-MoE hold the frozen position table, their
    # totals do not.
    return Plan(
        params_total=total,
        params_active=total - idle + whole.positions if idle else total,
        params_active_trainable=total - idle,
        params_experts=experts,
        macs_forward=published,
        macs_forward_merged=macs.total(cfg, "merged"),
        flops_train_per_image=6 * published,
        flops_executed_per_image=macs.flops_per_image(cfg, layout.micro_batch, pairs=layout.pairs),
        per_rank=per_rank(cfg, layout),
        stages=rows,
        activations_basis=ACTIVATIONS,
        warnings=tuple(_warnings(rows, layout, whole.moe)),
    )


def _rows(cfg: ModelConfig, layout: Layout) -> Iterator[Row]:
    whole = anatomy(cfg)
    moe, sizes = whole.moe, layout.of_micro_batch(whole.moe)
    published, merged = macs.forward(cfg, "published"), macs.forward(cfg, "merged")
    kept = activations.standing(cfg, sizes, layout.remat)
    for name in whole.stages:
        sites = [site for site in whole.sites if site.stage == name]
        routed = [site for site in sites if site.moe]
        share = routed[0].picks / moe.experts if moe and routed else 0.0
        yield Row(
            name=name,
            blocks=len(sites),
            tokens=sites[0].tokens,
            width=sites[0].width,
            params=sum(p.numel for p in parameters(cfg) if p.stage == name),
            macs=sum(work.macs for work in published if work.stage == name),
            macs_merged=sum(work.macs for work in merged if work.stage == name),
            moe_layers=len(routed),
            all_to_all_bytes=all_to_all(cfg, name, layout.item),
            tokens_per_expert=share * layout.global_batch,
            rows_per_expert=share * layout.micro_batch * layout.sizes.ep / layout.sizes.tp,
            activations=sum(kept[unit] for unit in {site.unit for site in sites}),
        )
    params, own, other = (
        sum(p.numel for p in parameters(cfg) if p.stage == AROUND),
        *(
            sum(work.macs for work in works if work.stage == AROUND)
            for works in (published, merged)
        ),
    )
    rest = activations.around(cfg, sizes) + activations.loss(cfg, sizes)
    yield Row(AROUND, 0, 0, 0, params, own, other, 0, 0, 0.0, 0.0, rest)


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
