"""A plain DiT as diffusers' `DiTTransformer2DModel` holds it: its keys and its config.json.

Every block there has its own copy of the time and label embedding. The time frequencies are part of
that class: those of `model.sinusoid_shift=1`. With a model of the published ones goes a file of
code, `published_dit.py`.
"""

from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain.layouts.dit import unlike_residual
from pretrain.layouts.rules import Layout, copied, kernel, module, readout, same
from pretrain.models.build import ModelConfig
from pretrain.models.dit import DiTConfig

STEM = "diffusion_pytorch_model"  # of the weight files
CODE = Path(__file__).with_name("published_dit.py")
_CLASS = "PublishedDiT"  # in CODE
_TIME = {"linear_1": "time1", "linear_2": "time2"}
_PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"}


def unlike(cfg: ModelConfig) -> list[str]:
    """What of this model that class cannot compute."""
    if not isinstance(cfg, DiTConfig):
        return [f"model.family={cfg.family}"]
    ratio = [f"model.mlp_ratio={cfg.mlp_ratio}"] * (cfg.mlp_ratio != 4)
    return ["model.qk_norm=true"] * cfg.qk_norm + ratio + unlike_residual(cfg)


def rules(cfg: DiTConfig) -> Layout:
    """Every key of that class for this configuration; the position table is not stored there."""
    blocks = [f"transformer_blocks.{i}" for i in range(cfg.depth)]
    inner = (cfg.in_channels, cfg.patch, cfg.patch)
    layout = [
        kernel("pos_embed.proj.weight", "embed.weight", inner),
        same("pos_embed.proj.bias", "embed.bias"),
        *module("proj_out_1", "head.adaln.up"),
        *readout("proj_out_2", "head.linear", cfg.readout_scale),
    ]
    for theirs, ours in _TIME.items():
        for part in ("weight", "bias"):
            names = [f"{b}.norm1.emb.timestep_embedder.{theirs}.{part}" for b in blocks]
            layout.append(copied(names, f"condition.{ours}.{part}"))
    names = [f"{b}.norm1.emb.class_embedder.embedding_table.weight" for b in blocks]
    layout.append(copied(names, "condition.label.weight"))
    for i, block in enumerate(blocks):
        layout += module(f"{block}.norm1.linear", f"blocks.{i}.adaln.up")
        for theirs, ours in _PROJECTIONS.items():
            layout += module(f"{block}.attn1.{theirs}", f"blocks.{i}.attn.{ours}")
        layout += module(f"{block}.ff.net.0.proj", f"blocks.{i}.ffn.fc1")
        layout += module(f"{block}.ff.net.2", f"blocks.{i}.ffn.fc2")
    return layout


def config(cfg: DiTConfig) -> dict[str, Any]:
    """config.json; it names the code where the class's own frequencies are not the model's."""
    code = {} if cfg.sinusoid_shift else {"auto_map": {"AutoModel": f"{CODE.stem}.{_CLASS}"}}
    return {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": metadata.version("diffusers"),
        "num_attention_heads": cfg.num_heads,
        "attention_head_dim": cfg.width // cfg.num_heads,
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "num_layers": cfg.depth,
        "sample_size": cfg.input_size,
        "patch_size": cfg.patch,
        "num_embeds_ada_norm": cfg.num_classes,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        **code,
    }
