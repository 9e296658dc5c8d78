"""U-DiT and U-DiT-MoE: a U of transformer blocks over latent pixels, three resolutions, one skip a
level.

The feed-forward is re-parameterised: parallel depthwise kernels and factored 1×1 convolutions in
training, their sum and product when merged. `merge` builds a new model; the trained one is never
touched. Source: Tian et al., U-DiTs: Downsample Tokens in U-Shaped Diffusion Transformers. Written
from a description, no reference code used. The mixture-of-experts variant is ours.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from parallel.tensor import Plan
from pretrain.models.attention import PhaseAttention, Rope
from pretrain.models.init import Xavier, Zero
from pretrain.models.layers import (
    AdaLN,
    Block,
    Condition,
    Conditioning,
    Conv,
    Linear,
    modulate,
    sinusoid,
    times,
)
from pretrain.models.moe import MoE, MoEConfig, Router, Routing, moe_layers
from pretrain.models.rep import FeedForward, Form, merge_into
from pretrain.models.shape import LatentConfig, fill_from_size, require_multiple

UDIT_SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 96, "num_heads": 4},
    "B": {"width": 192, "num_heads": 8},
    "L": {"width": 384, "num_heads": 16},
}
# Per stage: its width in units of h, its down-sampling, and which condition (0, 1, 2) it takes.
STAGES: dict[str, tuple[int, int, int]] = {
    "enc1": (1, 1, 0),
    "enc2": (2, 2, 1),
    "latent": (4, 4, 2),
    "dec2": (2, 2, 1),
    "dec1": (2, 1, 1),
}


class UDiTConfig(LatentConfig):
    """A U-DiT. A field given explicitly wins over `size`."""

    family: Literal["udit"] = "udit"
    size: str | None = None  # published size: S, B, L
    width: int = Field(ge=2)  # h: channels of the first stage; the others have 2h, 4h, 2h, 2h
    num_heads: int | None = Field(None, ge=1)  # heads in every stage; or give head_dim
    head_dim: int | None = Field(None, ge=4)  # channels of a head in every stage
    depth: tuple[int, int, int, int, int] = (2, 5, 8, 5, 2)  # blocks (of two sub-blocks) a stage
    mlp_ratio: float = Field(2.0, gt=0)  # hidden ÷ width of the feed-forward
    adaln_lora: int | None = Field(None, ge=1)  # rank = width ÷ this; null: full matrices
    label_dropout_independent: bool = (
        False  # published: each of the three label tables draws its own
    )
    moe: MoEConfig | None = None  # routed experts beside the feed-forward, in moe.stages
    keeps_adaln_zero: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        out = fill_from_size(values, UDIT_SIZES, ("width",), cls.model_fields)
        if values.get("head_dim") is not None and values.get("num_heads") is None:
            out.pop("num_heads", None)
        return out

    @model_validator(mode="after")
    def _check(self) -> "UDiTConfig":
        if (self.num_heads is None) == (self.head_dim is None):
            raise ValueError(
                f"num_heads={self.num_heads} and head_dim={self.head_dim}: give exactly one; "
                "heads are constant over the stages (as published), or the channels of a head are"
            )
        if self.mup is not None and self.mup.base_depth is not None:
            raise ValueError(
                f"mup.base_depth={self.mup.base_depth}: a U-DiT has the depth of its family; leave "
                "it out"
            )
        require_multiple("input_size", self.input_size, 8, "two halvings and a phase grid")
        require_multiple("width", self.width, 2, "down-sampling halves it")
        if min(self.depth) < 1:
            raise ValueError(f"depth={list(self.depth)} must be five numbers of at least 1 block")
        sub_blocks = dict(zip(STAGES, (2 * n for n in self.depth), strict=True))
        if self.moe and not any(sub_blocks[s] >= self.moe.every for s in self.moe.stages):
            raise ValueError(
                f"moe.every={self.moe.every} with moe.stages={list(self.moe.stages)} leaves no "
                "sub-block with experts; lower moe.every, name stages, or drop moe"
            )
        for stage in STAGES:
            width = self.stage_width(stage)
            if self.adaln_lora is not None:
                require_multiple(f"{stage} width", width, self.adaln_lora, "adaln_lora")
            if self.head_dim is not None:
                require_multiple(f"{stage} width", width, self.head_dim, "head_dim")
            else:
                require_multiple(f"{stage} width", width, self.num_heads or 1, "num_heads")
            head_dim = width // self.stage_heads(stage)
            require_multiple(f"{stage} head_dim", head_dim, 4, "rotary pairs of two axes")
        return self

    @property
    def dropout_draws(self) -> int:
        return UDiT.label_tables if self.label_dropout_independent else 1

    def stage_width(self, stage: str) -> int:
        """Channels of a stage."""
        return self.width * STAGES[stage][0]

    def heads(self) -> dict[str, int]:
        """Attention heads by what sets them."""
        key = "model.num_heads" if self.num_heads else "model.head_dim"
        return {f"{key} ({stage})": self.stage_heads(stage) for stage in STAGES}

    def head_dims(self) -> dict[str, int]:
        """Channels of an attention head by where it is."""
        return {stage: self.stage_width(stage) // self.stage_heads(stage) for stage in STAGES}

    def moe_tokens(self) -> list[int]:
        """Tokens of an image in each kind of MoE layer."""
        stages = self.moe.stages if self.moe else ()
        return [(self.input_size // STAGES[stage][1]) ** 2 for stage in stages]

    def stage_heads(self, stage: str) -> int:
        """Attention heads of a stage."""
        return self.num_heads or self.stage_width(stage) // (self.head_dim or 1)


class Pair(nn.Module):
    """The published block: two transformer sub-blocks. (B, H, W, C) -> the same."""

    def __init__(self, first: Block, second: Block) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(
        self, x: Tensor, cond: Conditioning, rope: Tensor
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        x, one = self.first(x, cond, rope)
        x, two = self.second(x, cond, rope)
        return x, tuple(routing for routing in (one, two) if routing is not None)


class Stage(nn.Module):
    """Blocks of one resolution and width, and their rotary table."""

    def __init__(self, cfg: UDiTConfig, name: str, form: Form) -> None:
        super().__init__()
        width, heads = cfg.stage_width(name), cfg.stage_heads(name)
        rank = None if cfg.adaln_lora is None else width // cfg.adaln_lora

        def sub_block(index: int) -> Block:
            ffn: nn.Module = FeedForward(width, round(cfg.mlp_ratio * width), form)
            if cfg.moe and name in cfg.moe.stages and (index + 1) % cfg.moe.every == 0:
                ffn = MoE(width, cfg.moe, ffn if cfg.moe.shared else None)
            return Block(AdaLN(width, 6, rank), PhaseAttention(width, heads), ffn)

        depth = cfg.depth[list(STAGES).index(name)]
        self.blocks = nn.ModuleList(
            Pair(sub_block(2 * i), sub_block(2 * i + 1)) for i in range(depth)
        )
        self.rope = Rope(cfg.input_size // STAGES[name][1] // 2, width // heads)

    def forward(self, x: Tensor, cond: Conditioning) -> tuple[Tensor, list[Routing]]:
        rope, seen = self.rope(), []
        for block in self.blocks:
            x, routed = block(x, cond, rope)
            seen += routed
        return x, seen


class Down(nn.Module):
    """(B, H, W, C) -> (B, H/2, W/2, 2C): halve the channels, then pixels to channels."""

    tensor_plan: ClassVar[Plan] = {"conv": "gathered"}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv(width, width // 2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        # why: (channel, row, column) with column fastest, the order of torch's pixel_unshuffle.
        return x.permute(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, 4 * channels)


class Up(nn.Module):
    """(B, H, W, C) -> (B, 2H, 2W, C/2): double the channels, then channels to pixels."""

    tensor_plan: ClassVar[Plan] = {"conv": "gathered"}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv(width, 2 * width, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height, width, channels // 4, 2, 2)
        return x.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, channels // 4)


class Head(nn.Module):
    """Convolution, adaLN, and a convolution that starts at zero. (B, H, W, C) -> (B, H, W, C')."""

    tensor_plan: ClassVar[Plan] = {"conv": "gathered"}

    def __init__(self, width: int, channels: int, scale: float) -> None:
        """scale: multiplies what the last convolution reads."""
        super().__init__()
        self.scale = scale
        self.conv = Conv(width, width, 3)
        self.adaln = AdaLN(width, 2)
        self.out = Conv(width, channels, 3, init=Zero())

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        x = self.conv(x)
        return self.out(times(modulate(x, *self.adaln(cond, x.ndim)), self.scale))


class UDiT(nn.Module):
    """Latent, time and label to a prediction, in the trained or in another form (`rep.Form`)."""

    label_tables = 3
    readout: ClassVar = "head.out"  # the layer that starts at zero and whose input is scaled
    tensor_plan: ClassVar[Plan] = {"reduce2": "gathered", "reduce1": "gathered"}

    def __init__(self, cfg: UDiTConfig, form: Form = "trained") -> None:
        super().__init__()
        self.cfg = cfg
        self.dtype = torch.float32  # of activations
        h, lora = cfg.width, cfg.adaln_lora is not None
        stem = Xavier(
            cfg.in_channels * 9, h
        )  # the references treat the stem kernel as a flat matrix
        self.stem = Conv(cfg.in_channels, h, 3, init=stem)
        self.condition1 = Condition(h, cfg.num_classes, lora)
        self.condition2 = Condition(2 * h, cfg.num_classes, lora)
        self.condition3 = Condition(4 * h, cfg.num_classes, lora)
        self.enc1 = Stage(cfg, "enc1", form)
        self.down1 = Down(h)
        self.enc2 = Stage(cfg, "enc2", form)
        self.down2 = Down(2 * h)
        self.latent = Stage(cfg, "latent", form)
        self.up2 = Up(4 * h)
        self.reduce2 = Linear(4 * h, 2 * h)
        self.dec2 = Stage(cfg, "dec2", form)
        self.up1 = Up(2 * h)
        self.reduce1 = Linear(2 * h, 2 * h)
        self.dec1 = Stage(cfg, "dec1", form)
        self.head = Head(2 * h, cfg.out_channels, cfg.readout_scale)

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Tensor, *, routing: bool = False
    ) -> Tensor | tuple[Tensor, list[Routing]]:
        """Predict from a noised latent.

        x_t: (B, C, H, W) float32; t: (B,) in sinusoid units (0..1000); cond: (B,) int64, or (B, 3)
        when each label table has its own, the value num_classes being the null label. Returns pred:
        (B, C or 2C, H, W) float32, and with `routing` one Routing for each MoE layer in order.
        """
        self.cfg.check_input(x_t)
        label1, label2, label3 = cond.view(len(x_t), -1).expand(-1, 3).unbind(1)
        waves = sinusoid(t).to(self.dtype)
        c1 = self.condition1(waves, label1)  # (B, h)
        c2 = self.condition2(waves, label2)  # (B, 2h)
        c3 = self.condition3(waves, label3)  # (B, 4h)
        x = x_t.to(self.dtype).permute(0, 2, 3, 1).contiguous()
        skip1, seen1 = self.enc1(self.stem(x), c1)  # (B, H, W, h)
        skip2, seen2 = self.enc2(self.down1(skip1), c2)  # (B, H/2, W/2, 2h)
        x, seen3 = self.latent(self.down2(skip2), c3)  # (B, H/4, W/4, 4h)
        x = self.reduce2(torch.cat([self.up2(x), skip2], dim=-1))
        x, seen4 = self.dec2(x, c2)  # (B, H/2, W/2, 2h)
        x = self.reduce1(torch.cat([self.up1(x), skip1], dim=-1))
        x, seen5 = self.dec1(x, c2)  # (B, H, W, 2h)
        pred = self.head(x, c2).permute(0, 3, 1, 2).float().contiguous()  # (B, C', H, W)
        return (pred, seen1 + seen2 + seen3 + seen4 + seen5) if routing else pred

    def stages(self) -> dict[str, Stage]:
        """The five stages by name, in the order data passes them."""
        return {name: getattr(self, name) for name in STAGES}

    def units(self) -> list[nn.Module]:
        """What is sharded and compiled one by one: the blocks of two sub-blocks, in order."""
        return [block for stage in self.stages().values() for block in stage.blocks]

    def routers(self) -> list[Router]:
        """The routers, which stay float32 whatever the precision."""
        return [layer.router for layer in moe_layers(self)]


def merge(model: UDiT) -> UDiT:
    """A new model in merged form with the same outputs; the given one is untouched, whatever its
    mode.

    Holds plain tensors only: gather a sharded model first. A merged model is copied.
    """
    with torch.device("meta"):
        merged = UDiT(model.cfg, "merged")
    merge_into(model, merged)
    merged.dtype = model.dtype
    return merged.train(model.training)
