"""The published state dicts of DiT-MoE: S, B and L as DiT with experts; XL and G with q and k
normed, and other names for the attention's projections."""

from typing import Any

from pretrain.layouts import dit
from pretrain.layouts.rules import (
    Guess,
    Layout,
    Shapes,
    count,
    module,
    need,
    same,
    stacked,
    unused,
)
from pretrain.models.dit import DIT_MOE_SIZES, PUBLISHED_MOE, DiTMoEConfig

_PARTS = ("gate", "up", "down")
# Settings of the forward pass; the others are of training or of the layout, or shown by the shapes.
_FORWARD = ("score", "renormalise", "scale", "router_input", "router_time", "balance", "shared")


def rules(cfg: DiTMoEConfig) -> Layout:
    """Every key of a DiT-MoE of this configuration; `model.qk_norm` chooses the variant."""
    layout = dit.scaffold(cfg)
    for i in range(cfg.depth):
        name = f"blocks.{i}"
        if cfg.qk_norm:
            layout += dit.block(i, qkv="attn.Wqkv", out="attn.out_proj")
            layout += module(f"{name}.attn.q_norm", f"{name}.attn.q_norm")
            layout += module(f"{name}.attn.k_norm", f"{name}.attn.k_norm")
        else:
            layout += dit.block(i, qkv="attn.qkv", out="attn.proj")
        layout.append(same(f"{name}.moe.gate.weight", f"{name}.ffn.router.weight"))
        layout.append(unused(f"{name}.ffn.router.bias", cfg.moe.experts))
        for part in _PARTS:
            experts = [f"{name}.moe.experts.{e}.{part}_proj.weight" for e in range(cfg.moe.experts)]
            shared = f"{name}.moe.shared_experts.{part}_proj.weight"
            layout.append(stacked(experts, f"{name}.ffn.experts.{part}"))
            layout.append(same(shared, f"{name}.ffn.shared.{part}.weight"))
    return layout


def unlike(cfg: DiTMoEConfig) -> list[str]:
    """Settings that no published DiT-MoE has, so that its keys cannot speak of them."""
    moe = cfg.moe.model_dump(mode="json")
    other = [f"model.moe.{key}={moe[key]}" for key in _FORWARD if moe[key] != PUBLISHED_MOE[key]]
    if cfg.moe.every != 1:
        other.append(f"model.moe.every={cfg.moe.every}")
    return other + dit.unlike_scaffold(cfg)


def infer(found: Shapes, where: str) -> Guess:
    """Raises WeightsError if the keys that tell are not there."""
    first = "blocks.0.moe"
    shared = f"{first}.shared_experts.gate_proj.weight"
    expert = f"{first}.experts.0.gate_proj.weight"
    need(found, dit.NEEDED | {f"{first}.gate.weight": 2, expert: 2, shared: 2}, where)
    guess = dit.infer_scaffold(found)
    width = guess.values["width"]
    guess.sizes = DIT_MOE_SIZES
    guess.values["qk_norm"] = "blocks.0.attn.q_norm.weight" in found
    if guess.values["qk_norm"]:
        guess.values["num_heads"] = width // found["blocks.0.attn.q_norm.weight"][0]
    guess.values["moe"] = _experts(found, width, first)
    guess.assumed["moe.top_k"] = "as published"
    return guess


def _experts(found: Shapes, width: int, layer: str) -> dict[str, Any]:
    ratios = {
        "hidden_ratio": found[f"{layer}.experts.0.gate_proj.weight"][0] / width,
        "shared_ratio": found[f"{layer}.shared_experts.gate_proj.weight"][0] / width,
    }
    published = {key: value for key, value in ratios.items() if value != PUBLISHED_MOE[key]}
    top_k = PUBLISHED_MOE["top_k"]
    return {"experts": count(found, f"{layer}.experts"), "top_k": top_k, **published}
