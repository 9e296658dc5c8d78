"""Mixture of experts: the router, the routed experts, and the layer that sets them beside a shared.

Routing is dropless and the same in training and evaluation. The balance bias, the auxiliary losses
and everything that needs a sum over ranks belong to the engine: a layer only reports `Routing`.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from parallel.experts import combine, count_picks, dispatch, grouped_mm, order_by_expert
from pretrain.models.init import Fill, Init, Uniform, Xavier, Zero

StageName = Literal["enc1", "enc2", "latent", "dec2", "dec1"]


class MoEConfig(BaseModel):
    """Routed experts. The defaults are our U-DiT-MoE; DiT-MoE fills in the published form."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    experts: int = Field(8, ge=1)  # routed experts a layer
    top_k: int = Field(2, ge=1)  # experts a token
    hidden: int | None = Field(None, ge=1)  # channels inside an expert; wins over hidden_ratio
    hidden_ratio: float = Field(0.25, gt=0)  # the same, as a multiple of the layer's width
    stages: tuple[StageName, ...] = ("latent",)  # U-DiT: stages that get experts
    every: int = Field(1, ge=1)  # experts in every n-th (sub-)block of those stages
    shared: bool = True  # keep an always-on feed-forward beside the routed experts
    shared_ratio: float = Field(2.0, gt=0)  # DiT-MoE: width of that SwiGLU, as a multiple of width
    score: Literal["softmax", "sigmoid"] = "sigmoid"  # of the router's logits
    renormalise: bool = True  # weights of the chosen experts sum to 1 (before scale)
    scale: float = Field(1.0, gt=0)  # multiplies the weights
    router_input: Literal["unmodulated", "modulated"] = "unmodulated"  # normed tokens it reads
    router_time: bool = True  # add W_t·SiLU(time) to the logits, one vector an image
    balance: Literal["bias", "none"] = "bias"  # selection bias moved by the engine
    bias_rate: float = Field(1e-3, ge=0)  # its step: bias += rate·sign(mean − count)
    aux_batch: float = Field(0.0, ge=0)  # weight of the published batch-wise loss
    aux_image: float = Field(0.0, ge=0)  # weight of the per-image loss
    z_loss: float = Field(0.0, ge=0)  # weight of mean logsumexp²

    @model_validator(mode="after")
    def _check(self) -> "MoEConfig":
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k={self.top_k} must be at most experts={self.experts}; "
                "lower top_k or raise experts"
            )
        return self

    def width(self, channels: int) -> int:
        """Channels inside one expert of a layer of `channels`."""
        return self.hidden or max(1, round(self.hidden_ratio * channels))


class Routing(NamedTuple):
    """What one MoE layer did with a batch. B images, E experts."""

    counts: Tensor  # (B, E) float32, no gradient: token picks
    probs: Tensor  # (B, E) float32: sum over tokens of the score, normalised over experts
    z: Tensor  # (B,) float32: sum over tokens of logsumexp(logits)²


class Router(nn.Module):
    """Choose k experts a token, in float32.

    An expert is chosen by score + bias and weighted by the score alone. The time term is one vector
    an image: it moves which experts an image prefers, and cannot change which of its tokens an
    expert prefers.
    """

    def __init__(self, width: int, cfg: MoEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.experts, width))
        self.inits: dict[str, Init] = {"weight": Uniform(1 / math.sqrt(width)), "bias": Fill(0.0)}
        if cfg.router_time:
            self.time = nn.Parameter(torch.empty(cfg.experts, width))
            self.inits["time"] = Zero()
        self.register_buffer("bias", torch.empty(cfg.experts, dtype=torch.float32))

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """x: (B, N, C) normed tokens; time: (B, C) -> weights, experts: (B, N, k), Routing."""
        cfg = self.cfg
        logits = F.linear(x.float(), self.weight.float())  # (B, N, E)
        if cfg.router_time:
            logits = logits + F.linear(time.float(), self.time.float())[:, None]
        if cfg.score == "softmax":
            score = shares = logits.softmax(-1)
        else:
            score = logits.sigmoid()
            shares = score / score.sum(-1, keepdim=True)
        experts = (score.detach() + self.bias.float()).topk(cfg.top_k, dim=-1).indices
        weights = score.gather(-1, experts)  # (B, N, k)
        if cfg.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        counts = count_picks(experts.flatten(1), cfg.experts).float()
        z = logits.logsumexp(-1).square().sum(-1)
        return weights * cfg.scale, experts, Routing(counts, shares.sum(1), z)


class Experts(nn.Module):
    """All routed experts of a layer: bias-free SwiGLUs, each matrix one tensor (E, out, in)."""

    def __init__(self, width: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.up = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.inits: dict[str, Init] = {
            name: Xavier(width, hidden) for name in ("gate", "up", "down")
        }

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows: (T, C) in order of expert; counts: (E,) int64. Returns (T, C)."""
        hidden = F.silu(grouped_mm(rows, self.gate, counts)) * grouped_mm(rows, self.up, counts)
        return grouped_mm(hidden, self.down, counts)


class MoE(nn.Module):
    """Shared(x) + Σ_k w_k·Expert_k(x); `shared` is any feed-forward over these tokens, or None."""

    def __init__(self, width: int, cfg: MoEConfig, shared: nn.Module | None) -> None:
        super().__init__()
        self.cfg = cfg
        self.router = Router(width, cfg)
        self.experts = Experts(width, cfg.width(width), cfg.experts)
        self.shared = shared

    def forward(self, x: Tensor, normed: Tensor, time: Tensor) -> tuple[Tensor, Routing]:
        """x: (B, ..., C) modulated tokens; normed: the same before modulation; time: (B, C)."""
        seen = x if self.cfg.router_input == "modulated" else normed
        weights, experts, routing = self.router(seen.flatten(1, -2), time)
        order = order_by_expert(experts.flatten(0, 1), self.cfg.experts)
        rows = dispatch(x.reshape(-1, x.shape[-1]), order, self.cfg.top_k)
        rows = self.experts(rows, order.counts)
        out = combine(rows, weights.flatten(0, 1), order).view(x.shape)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, routing


def moe_layers(model: nn.Module) -> list[MoE]:
    """The MoE layers of a model, in the order of their `Routing`; each has `.router.bias`, (E,)."""
    return [module for module in model.modules() if isinstance(module, MoE)]
