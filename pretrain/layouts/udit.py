"""The published state dict of U-DiT, in the form that is trained, with its parallel kernels apart.

A state dict that the authors' code saved after it was switched to evaluation has its 5×5 kernels
merged in place; nothing in the file shows it, so it cannot be told from a good one here.
"""

from pretrain.layouts.rules import (
    Guess,
    Layout,
    Shapes,
    count,
    fused,
    kernel,
    module,
    need,
    per_head,
    readout,
    same,
)
from pretrain.models.udit import STAGES, UDIT_SIZES, UDiTConfig

_NAMES = {
    "enc1": "encoder_level_1",
    "enc2": "encoder_level_2",
    "latent": "latent",
    "dec2": "decoder_level_2",
    "dec1": "decoder_level_1",
}
_MOVES = {"down1_2": "down1", "down2_3": "down2", "up3_2": "up2", "up2_1": "up1"}
_INPUT_SIZE = 32  # published; no tensor tells


def rules(cfg: UDiTConfig) -> Layout:
    """Every key of a U-DiT of this configuration."""
    h = cfg.width
    layout = module("x_embedder.proj", "stem")
    for i in (1, 2, 3):
        layout += module(f"t_embedder_{i}.mlp.0", f"condition{i}.time1")
        layout += module(f"t_embedder_{i}.mlp.2", f"condition{i}.time2")
        table = f"y_embedder_{i}.embedding_table.weight"
        layout.append(same(table, f"condition{i}.label.weight"))
    for theirs, ours in _MOVES.items():
        layout += module(f"{theirs}.body.0", f"{ours}.conv", bias=False)
    layout += _linear("reduce_chan_level2", "reduce2", 4 * h)
    layout += _linear("reduce_chan_level1", "reduce1", 2 * h)
    for (stage, theirs), depth in zip(_NAMES.items(), cfg.depth, strict=True):
        width = cfg.stage_width(stage)
        for i in range(depth):
            for number, half in ((1, "first"), (2, "second")):
                layout += _sub_block(
                    f"{theirs}.{i}", number, f"{stage}.blocks.{i}.{half}", width, cfg
                )
    layout += module("output", "head.conv")
    layout += module("final_layer.adaLN_modulation.1", "head.adaln.up")
    layout += readout("final_layer.out_proj", "head.out", cfg.readout_scale)
    return layout


def unlike(cfg: UDiTConfig) -> list[str]:
    """Settings that no published U-DiT has, so that its keys cannot speak of them."""
    return ["model.moe"] * (cfg.moe is not None) + [f"model.adaln_lora={cfg.adaln_lora}"] * (
        cfg.adaln_lora is not None
    )


def infer(found: Shapes, where: str) -> Guess:
    """Raises WeightsError if the keys that tell are not there."""
    scale, inner = (
        f"encoder_level_1.0.{part}" for part in ("attn1.logit_scale", "mlp1.project_in.1.weight")
    )
    label, out = "y_embedder_1.embedding_table.weight", "final_layer.out_proj.weight"
    need(found, {"x_embedder.proj.weight": 4, label: 2, out: 4, scale: 3, inner: 4}, where)
    width, channels = found["x_embedder.proj.weight"][:2]
    values = {
        "width": width,
        "num_heads": found[scale][0],
        "depth": tuple(count(found, _NAMES[stage]) for stage in STAGES),
        "mlp_ratio": found[inner][0] / width,
        "input_size": _INPUT_SIZE,
        "in_channels": channels,
        "num_classes": found[label][0] - 1,
        "learn_sigma": found[out][0] == 2 * channels,
    }
    return Guess(values, {"input_size": "as published"}, UDIT_SIZES)


def _sub_block(theirs: str, number: int, ours: str, width: int, cfg: UDiTConfig) -> Layout:
    attn, mlp = f"{theirs}.attn{number}", f"{theirs}.mlp{number}"
    core, ffn = f"{ours}.attn.core", f"{ours}.ffn"
    hidden = round(cfg.mlp_ratio * width)
    qkv = [
        fused(f"{attn}.to_qkv.{part}", [f"{core}.{x}.{part}" for x in "qkv"])
        for part in ("weight", "bias")
    ]
    return [
        *module(f"{theirs}.adaLN_modulation{number}.1", f"{ours}.adaln.up"),
        *module(f"{attn}.downsampler.layer", f"{ours}.attn.mix"),
        *qkv,
        *_linear(f"{attn}.to_out", f"{core}.out", width),
        per_head(f"{attn}.logit_scale", f"{core}.logit_scale"),
        *_linear(f"{mlp}.project_in.0", f"{ffn}.expand.first", width),
        *_linear(f"{mlp}.project_in.1", f"{ffn}.expand.second", width),
        *module(f"{mlp}.dwconv.0", f"{ffn}.mix.five"),
        *module(f"{mlp}.dwconv.1", f"{ffn}.mix.three"),
        *module(f"{mlp}.dwconv.2", f"{ffn}.mix.one"),
        *_linear(f"{mlp}.project_out.0", f"{ffn}.contract.first", hidden),
        *_linear(f"{mlp}.project_out.1", f"{ffn}.contract.second", width),
    ]


def _linear(theirs: str, ours: str, width: int) -> Layout:
    """Their 1×1 convolution of `width` channels is our linear."""
    return [
        kernel(f"{theirs}.weight", f"{ours}.weight", (width, 1, 1)),
        same(f"{theirs}.bias", f"{ours}.bias"),
    ]
