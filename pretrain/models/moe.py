"""Mixture of experts: the router, the routed experts, and the layer that sets them beside a shared.

Routing is the same in training and evaluation. How tokens reach experts is the dispatcher's. The
balance bias, the auxiliary losses and everything that needs a sum over ranks belong to the engine:
a layer only reports `Routing`.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from parallel.dispatch import Dispatcher, Exact
from parallel.experts import Picks, count_picks, take
from parallel.fp8.grouped import grouped
from parallel.fp8.product import Product
from parallel.kernels.swiglu import swiglu
from parallel.tensor import part
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
    router_time: bool = True  # logits know the time, by one vector W_t·SiLU(time) an image
    # bias: moved by the engine, for selection only; expert_choice: experts choose tokens
    balance: Literal["bias", "none", "expert_choice"] = "bias"
    bias_rate: float = Field(1e-3, ge=0)  # step of the bias: bias += rate·sign(mean − count)
    aux_batch: float = Field(0.0, ge=0)  # weight of the published batch-wise loss
    aux_image: float = Field(0.0, ge=0)  # weight of the per-image loss
    z_loss: float = Field(0.0, ge=0)  # weight of mean logsumexp²
    dispatcher: Literal["exact", "static"] = "exact"  # drops nothing | never waits for the device
    capacity: float = Field(2.0, ge=1)  # static: a rank's buffer ÷ its even share of picks

    @model_validator(mode="after")
    def _check(self) -> "MoEConfig":
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k={self.top_k} must be at most experts={self.experts}; "
                "lower top_k or raise experts"
            )
        if self.balance == "expert_choice" and (self.aux_batch or self.aux_image):
            raise ValueError(
                f"aux_batch={self.aux_batch}, aux_image={self.aux_image} with "
                "balance=expert_choice: experts that choose are even by construction; "
                "set both losses to 0, or balance to bias or none"
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
    dropped: Tensor  # () float32, no gradient: picks of the batch that no expert saw


class Router(nn.Module):
    """Choose experts for tokens, or tokens for experts, in float32.

    Top-k: a token takes the k experts of largest score + bias and weighs them by the score alone.
    Expert choice: an expert takes the ceil(N·k/E) tokens of largest score of each image, so a token
    may have any number of experts. Source: Mixture-of-Experts with Expert Choice Routing.

    The time term is one vector an image. Added to the logits it moves which experts an image
    prefers, and cannot change which of its tokens an expert prefers. So where experts choose it is
    multiplied: logits·(1 + W_t·SiLU(time)).
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

    def forward(self, x: Tensor, time: Tensor) -> tuple[Picks, Routing]:
        """x: (B, N, C) normed tokens; time: (B, C). Picks are of all B·N tokens together."""
        cfg = self.cfg
        logits = F.linear(x.float(), self.weight.float())  # (B, N, E)
        if cfg.router_time:
            shift = F.linear(time.float(), self.time.float())[:, None]
            logits = logits * (1 + shift) if cfg.balance == "expert_choice" else logits + shift
        if cfg.score == "softmax":
            score = shares = logits.softmax(-1)
        else:
            score = logits.sigmoid()
            shares = score / score.sum(-1, keepdim=True)
        if cfg.balance == "expert_choice":
            picks, counts = self._by_expert(score)
        else:
            picks, counts = self._by_token(score)
        z = logits.logsumexp(-1).square().sum(-1)
        routing = Routing(counts, shares.sum(1), z, dropped=torch.zeros((), device=x.device))
        return picks, routing

    def _by_token(self, score: Tensor) -> tuple[Picks, Tensor]:
        """score: (B, N, E) -> picks, counts (B, E)."""
        cfg = self.cfg
        experts = (score.detach() + self.bias.float()).topk(cfg.top_k, dim=-1).indices
        weights = score.gather(-1, experts)  # (B, N, k)
        if cfg.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        counts = count_picks(experts.flatten(1), cfg.experts).float()
        tokens = torch.arange(experts.shape[0] * experts.shape[1], device=score.device)
        tokens = tokens.repeat_interleave(cfg.top_k)
        weights = weights.flatten() * cfg.scale  # why: last, or FSDP warns of a view
        return Picks(experts.flatten(), weights, tokens, cfg.top_k), counts

    def _by_expert(self, score: Tensor) -> tuple[Picks, Tensor]:
        """score: (B, N, E) -> picks, counts (B, E)."""
        cfg = self.cfg
        images, num_tokens, num_experts = score.shape
        each = math.ceil(num_tokens * cfg.top_k / num_experts)  # tokens an expert takes
        best = score.detach().transpose(1, 2).topk(each, dim=-1).indices  # (B, E, each)
        chosen = torch.zeros_like(score, dtype=torch.bool).transpose(1, 2).contiguous()
        chosen = chosen.scatter_(-1, best, True).transpose(1, 2)  # (B, N, E)
        if cfg.renormalise:
            score = score / (torch.where(chosen, score, 0).sum(-1, keepdim=True) + 1e-20)
        # why: the n-th set place by search in a running count; its number is known without looking.
        flat = chosen.flatten()
        nth = flat.cumsum(0)  # (B·N·E,)
        wanted = torch.arange(1, best.numel() + 1, device=score.device)
        places = torch.searchsorted(nth, wanted)  # (P,)
        weights = take(score.flatten(), places, (nth - 1).clamp(min=0), flat) * cfg.scale
        lengths = chosen.flatten(0, 1).sum(-1)
        picks = Picks(places % num_experts, weights, places // num_experts, lengths)
        return picks, chosen.sum(1).float()


class Experts(nn.Module):
    """All routed experts of a layer: bias-free SwiGLUs, each matrix one tensor (E, out, in)."""

    fp8_products: ClassVar = ("gate", "up", "down")

    def __init__(self, width: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.up = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.inits: dict[str, Init] = {
            name: Xavier(width, hidden) for name in ("gate", "up", "down")
        }
        self.fp8: dict[str, Product] = {}

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows: (R, C) in order of expert; counts: (E,) int64, or one more: of rows to ignore.

        E is the number of experts on this rank. Returns (R, C).
        """
        gate, up, down = (part(w, rows.dtype) for w in (self.gate, self.up, self.down))
        fp8 = self.fp8.get
        opened = grouped(rows, gate, counts, fp8("gate"))
        hidden = swiglu(opened, grouped(rows, up, counts, fp8("up")))
        return grouped(hidden, down, counts, fp8("down"))


class MoE(nn.Module):
    """Shared(x) + Σ_k w_k·Expert_k(x); `shared` is any feed-forward over these tokens, or None."""

    def __init__(self, width: int, cfg: MoEConfig, shared: nn.Module | None) -> None:
        super().__init__()
        self.cfg = cfg
        self.router = Router(width, cfg)
        self.experts = Experts(width, cfg.width(width), cfg.experts)
        self.shared = shared
        self.dispatcher: Dispatcher = Exact(cfg.experts)  # whoever shards experts sets another

    def forward(self, x: Tensor, normed: Tensor, time: Tensor) -> tuple[Tensor, Routing]:
        """x: (B, ..., C) modulated tokens; normed: the same before modulation; time: (B, C)."""
        seen = x if self.cfg.router_input == "modulated" else normed
        picks, routing = self.router(seen.flatten(1, -2), time)
        shared = self.shared
        beside = None if shared is None else lambda: shared(x)
        out, side, dropped = self.dispatcher(x.flatten(0, -2), picks, self.experts, beside)
        out = out.view(x.shape)
        return out if side is None else out + side, routing._replace(dropped=dropped)


def moe_layers(model: nn.Module) -> list[MoE]:
    """The MoE layers of a model, in the order of their `Routing`; each has `.router.bias`, (E,)."""
    return [module for module in model.modules() if isinstance(module, MoE)]
