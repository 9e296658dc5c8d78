"""The blocks of a model and the layers around them, by arithmetic on its configuration.

What the other rooms of the plan count over: no model is built for it. Numbers are of one image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pretrain.models.dit import DiTConfig, DiTMoEConfig
from pretrain.models.families import ModelConfig
from pretrain.models.moe import MoEConfig
from pretrain.models.udit import STAGES, UDiTConfig

FeedForward = Literal["mlp", "swiglu", "rep"]  # DiT's | DiT-MoE's shared expert | U-DiT's
AROUND = "rest"  # the row of what belongs to no stage


@dataclass(frozen=True)
class Site:
    """One transformer block (a U-DiT block of two is two of these)."""

    path: str  # of the block in the model
    stage: str
    unit: int  # index of what is sharded and recomputed as one
    grid: int  # tokens a side
    width: int  # channels of a token
    heads: int
    attention: Literal["dot", "norm", "cosine"]
    windows: int  # token sets that attend within themselves
    rank: int | None  # of adaLN's low-rank part; None: a full matrix
    ffn: FeedForward | None  # beside experts: the shared one; None: experts alone
    hidden: int  # channels inside `ffn`
    moe: MoEConfig | None  # routed experts

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def expert_width(self) -> int:
        return self.moe.width(self.width) if self.moe else 0

    @property
    def picks(self) -> int:
        """Rows that experts see of one image."""
        if self.moe is None:
            return 0
        if self.moe.balance == "expert_choice":
            return self.moe.experts * -(-self.tokens * self.moe.top_k // self.moe.experts)
        return self.tokens * self.moe.top_k


@dataclass(frozen=True)
class Layer:
    """A linear or a convolution that belongs to no block."""

    path: str
    part: str
    applied: int  # places an image; 1 for what sees the image's condition
    inner: int
    outer: int
    kernel: int = 1  # a side
    bias: bool = True
    cut: Literal["column", "row", "gathered", None] = None  # by tensor parallelism

    @property
    def macs(self) -> int:
        return self.applied * self.inner * self.outer * self.kernel**2


@dataclass(frozen=True)
class Table:
    """Rows that are looked up: labels."""

    path: str
    rows: int
    width: int


@dataclass(frozen=True)
class Anatomy:
    """A whole model."""

    sites: tuple[Site, ...]
    around: tuple[Layer, ...]
    tables: tuple[Table, ...]
    positions: int  # values of the frozen position table, which published MoE counts include
    pixels: int  # of the latent
    channels: tuple[int, int]  # of the latent in, of the prediction out
    spatial: bool  # tokens are kept as (H, W): parameters of 1×1 layers are linears all the same

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site.stage for site in self.sites))

    @property
    def units(self) -> int:
        return self.sites[-1].unit + 1

    @property
    def moe(self) -> MoEConfig | None:
        return next((site.moe for site in self.sites if site.moe), None)


@lru_cache(maxsize=64)
def anatomy(cfg: ModelConfig) -> Anatomy:
    if isinstance(cfg, UDiTConfig):
        return _udit(cfg)
    return _dit(cfg)


def _dit(cfg: DiTConfig | DiTMoEConfig) -> Anatomy:
    grid, width = cfg.input_size // cfg.patch, cfg.width
    moe = cfg.moe if isinstance(cfg, DiTMoEConfig) else None

    def site(index: int) -> Site:
        routed = moe if moe and (index + 1) % moe.every == 0 else None
        ffn: FeedForward | None = "mlp"
        hidden = round(cfg.mlp_ratio * width)
        if routed:
            ffn, hidden = (
                ("swiglu", round(routed.shared_ratio * width)) if routed.shared else (None, 0)
            )
        return Site(
            path=f"blocks.{index}",
            stage="blocks",
            unit=index,
            grid=grid,
            width=width,
            heads=cfg.num_heads,
            attention="norm" if cfg.qk_norm else "dot",
            windows=1,
            rank=None,
            ffn=ffn,
            hidden=hidden,
            moe=routed,
        )

    tokens = grid**2
    pixels = cfg.patch**2
    around = (
        Layer("embed", "embed", tokens, cfg.in_channels * pixels, width),
        *_condition("condition", width, shared=False),
        Layer("head.adaln.up", "head", 1, width, 2 * width, cut="gathered"),
        Layer("head.linear", "head", tokens, width, pixels * cfg.out_channels),
    )
    return Anatomy(
        sites=tuple(site(index) for index in range(cfg.depth)),
        around=around,
        tables=(Table("condition.label", cfg.num_classes + 1, width),),
        positions=tokens * width,
        pixels=cfg.input_size**2,
        channels=(cfg.in_channels, cfg.out_channels),
        spatial=False,
    )


def _condition(path: str, width: int, *, shared: bool) -> Iterator[Layer]:
    from pretrain.models.layers import FREQUENCIES

    yield Layer(f"{path}.time1", "condition", 1, FREQUENCIES, width, cut="column")
    yield Layer(f"{path}.time2", "condition", 1, width, width, cut="row")
    if shared:
        yield Layer(f"{path}.adaln", "adaln", 1, width, 6 * width, cut="gathered")


def _udit(cfg: UDiTConfig) -> Anatomy:
    h, unit = cfg.width, 0
    sites: list[Site] = []
    for name, depth in zip(STAGES, cfg.depth, strict=True):
        width = cfg.stage_width(name)
        for index in range(2 * depth):
            inside = cfg.moe is not None and name in cfg.moe.stages
            moe = cfg.moe if inside and cfg.moe and (index + 1) % cfg.moe.every == 0 else None
            alone = moe is not None and not moe.shared
            half = ("first", "second")[index % 2]
            sites.append(
                Site(
                    path=f"{name}.blocks.{index // 2}.{half}",
                    stage=name,
                    unit=unit + index // 2,
                    grid=cfg.input_size // STAGES[name][1],
                    width=width,
                    heads=cfg.stage_heads(name),
                    attention="cosine",
                    windows=4,
                    rank=None if cfg.adaln_lora is None else width // cfg.adaln_lora,
                    ffn=None if alone else "rep",
                    hidden=0 if alone else round(cfg.mlp_ratio * width),
                    moe=moe,
                )
            )
        unit += depth
    fine, middle, coarse = (cfg.input_size**2 // 4**level for level in range(3))
    lora = cfg.adaln_lora is not None
    around = (
        Layer("stem", "embed", fine, cfg.in_channels, h, 3),
        *_condition("condition1", h, shared=lora),
        *_condition("condition2", 2 * h, shared=lora),
        *_condition("condition3", 4 * h, shared=lora),
        Layer("down1.conv", "resample", fine, h, h // 2, 3, False, "gathered"),
        Layer("down2.conv", "resample", middle, 2 * h, h, 3, False, "gathered"),
        Layer("up2.conv", "resample", coarse, 4 * h, 8 * h, 3, False, "gathered"),
        Layer("reduce2", "resample", middle, 4 * h, 2 * h, cut="gathered"),
        Layer("up1.conv", "resample", middle, 2 * h, 4 * h, 3, False, "gathered"),
        Layer("reduce1", "resample", fine, 2 * h, 2 * h, cut="gathered"),
        Layer("head.conv", "head", fine, 2 * h, 2 * h, 3, cut="gathered"),
        Layer("head.adaln.up", "head", 1, 2 * h, 4 * h, cut="gathered"),
        Layer("head.out", "head", fine, 2 * h, cfg.out_channels, 3),
    )
    tables = tuple(
        Table(f"condition{n}.label", cfg.num_classes + 1, n_width)
        for n, n_width in ((1, h), (2, 2 * h), (3, 4 * h))
    )
    return Anatomy(
        sites=tuple(sites),
        around=around,
        tables=tables,
        positions=0,
        pixels=fine,
        channels=(cfg.in_channels, cfg.out_channels),
        spatial=True,
    )
