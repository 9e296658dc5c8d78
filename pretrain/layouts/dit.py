"""The published state dict of DiT: its keys beside our tensors, and the configuration it tells.

`pos_embed` is a table that both sides compute; it is written, and on reading only compared.
"""

import math
from functools import partial

from torch import Tensor

from pretrain.layouts.rules import (
    Guess,
    Layout,
    Shapes,
    count,
    fused,
    kernel,
    module,
    need,
    readout,
    same,
    table,
)
from pretrain.models.dit import DIT_SIZES, DiTConfig, DiTShape
from pretrain.models.layers import position_table

NEEDED = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
}
_HEAD_DIMS = (64, 72)  # tried in this order where no published size is met


def rules(cfg: DiTConfig) -> Layout:
    """Every key of a DiT of this configuration."""
    layout = scaffold(cfg)
    for i in range(cfg.depth):
        layout += block(i, qkv="attn.qkv", out="attn.proj")
        layout += module(f"blocks.{i}.mlp.fc1", f"blocks.{i}.ffn.fc1")
        layout += module(f"blocks.{i}.mlp.fc2", f"blocks.{i}.ffn.fc2")
    return layout


def unlike(cfg: DiTConfig) -> list[str]:
    """Settings that no published DiT has, so that its keys cannot speak of them."""
    return ["model.qk_norm=true"] * cfg.qk_norm + unlike_scaffold(cfg)


def infer(found: Shapes, where: str) -> Guess:
    """Raises WeightsError if the keys that tell are not there."""
    need(found, NEEDED | {"blocks.0.mlp.fc1.weight": 2}, where)
    guess = infer_scaffold(found)
    hidden, width = found["blocks.0.mlp.fc1.weight"]
    guess.values["mlp_ratio"] = hidden / width
    guess.sizes = DIT_SIZES
    return guess


def scaffold(cfg: DiTShape) -> Layout:
    """What stands around the blocks; DiT-MoE has the same."""
    return [
        kernel("x_embedder.proj.weight", "embed.weight", (cfg.in_channels, cfg.patch, cfg.patch)),
        same("x_embedder.proj.bias", "embed.bias"),
        table("pos_embed", partial(_positions, cfg.width, cfg.input_size // cfg.patch)),
        *module("t_embedder.mlp.0", "condition.time1"),
        *module("t_embedder.mlp.2", "condition.time2"),
        same("y_embedder.embedding_table.weight", "condition.label.weight"),
        *module("final_layer.adaLN_modulation.1", "head.adaln.up"),
        *readout("final_layer.linear", "head.linear", cfg.readout_scale),
    ]


def block(i: int, *, qkv: str, out: str) -> Layout:
    """Modulation and attention of one block; qkv, out: what the family calls the projections."""
    name = f"blocks.{i}"
    parts = [
        fused(f"{name}.{qkv}.{part}", [f"{name}.attn.{x}.{part}" for x in "qkv"])
        for part in ("weight", "bias")
    ]
    return [
        *module(f"{name}.adaLN_modulation.1", f"{name}.adaln.up"),
        *parts,
        *module(f"{name}.{out}", f"{name}.attn.out"),
    ]


def unlike_scaffold(cfg: DiTShape) -> list[str]:
    shift = [f"model.sinusoid_shift={cfg.sinusoid_shift}"] * bool(cfg.sinusoid_shift)
    return shift + unlike_residual(cfg)


def unlike_residual(cfg: DiTShape) -> list[str]:
    """Residual branches that are scaled, which no other program's blocks do."""
    return ["model.mup.base_depth"] * (cfg.residual_scale != 1.0)


def infer_scaffold(found: Shapes) -> Guess:
    """Everything but the feed-forward and the heads; `NEEDED` are there."""
    width, channels, patch, _ = found["x_embedder.proj.weight"]
    out = found["final_layer.linear.weight"][0] // patch**2
    values = {
        "depth": count(found, "blocks"),
        "width": width,
        "patch": patch,
        "input_size": math.isqrt(found["pos_embed"][1]) * patch,
        "in_channels": channels,
        "num_classes": found["y_embedder.embedding_table.weight"][0] - 1,
        "learn_sigma": out == 2 * channels,
    }
    return Guess(values)


def guess_heads(guess: Guess) -> None:
    """Sets num_heads where nothing tells it: of the published size of this width and depth, else
    for heads of 64 or 72 channels, else not at all."""
    width, depth = guess.values["width"], guess.values["depth"]
    for name, size in guess.sizes.items():
        if (size["width"], size["depth"]) == (width, depth):
            guess.values["num_heads"] = size["num_heads"]
            guess.assumed["num_heads"] = f"as {name} has"
            return
    for head_dim in _HEAD_DIMS:
        if width % head_dim == 0:
            guess.values["num_heads"] = width // head_dim
            guess.assumed["num_heads"] = f"{head_dim} channels a head"
            return


def _positions(width: int, grid: int) -> Tensor:
    return position_table(width, grid)[None]
