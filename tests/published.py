"""The published models once more, straight from their state dicts: keys and shapes written out by
hand, and the forward passes of DiT, DiT-MoE and U-DiT on plain dicts. For comparison only.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def _linear(keys: dict[str, tuple[int, ...]], name: str, out: int, inner: int) -> None:
    keys[f"{name}.weight"], keys[f"{name}.bias"] = (out, inner), (out,)


def _conv(keys: dict[str, tuple[int, ...]], name: str, *shape: int, bias: bool = True) -> None:
    keys[f"{name}.weight"] = shape
    if bias:
        keys[f"{name}.bias"] = shape[:1]


def dit_keys(
    depth: int, d: int, patch: int, grid: int, classes: int, *, experts: int = 0, norm: int = 0
) -> dict[str, tuple[int, ...]]:
    """Of DiT; of DiT-MoE with experts; norm: channels of a head where q and k are normed."""
    keys: dict[str, tuple[int, ...]] = {"pos_embed": (1, grid * grid, d)}
    _conv(keys, "x_embedder.proj", d, 4, patch, patch)
    _linear(keys, "t_embedder.mlp.0", d, 256)
    _linear(keys, "t_embedder.mlp.2", d, d)
    keys["y_embedder.embedding_table.weight"] = (classes + 1, d)
    for i in range(depth):
        b = f"blocks.{i}"
        _linear(keys, f"{b}.adaLN_modulation.1", 6 * d, d)
        _linear(keys, f"{b}.attn.{'Wqkv' if norm else 'qkv'}", 3 * d, d)
        _linear(keys, f"{b}.attn.{'out_proj' if norm else 'proj'}", d, d)
        for name in ("q_norm", "k_norm") if norm else ():
            keys[f"{b}.attn.{name}.weight"] = keys[f"{b}.attn.{name}.bias"] = (norm,)
        if not experts:
            _linear(keys, f"{b}.mlp.fc1", 4 * d, d)
            _linear(keys, f"{b}.mlp.fc2", d, 4 * d)
            continue
        keys[f"{b}.moe.gate.weight"] = (experts, d)
        sizes = {f"experts.{e}": 4 * d for e in range(experts)} | {"shared_experts": 2 * d}
        for name, hidden in sizes.items():
            keys[f"{b}.moe.{name}.gate_proj.weight"] = (hidden, d)
            keys[f"{b}.moe.{name}.up_proj.weight"] = (hidden, d)
            keys[f"{b}.moe.{name}.down_proj.weight"] = (d, hidden)
    _linear(keys, "final_layer.adaLN_modulation.1", 2 * d, d)
    _linear(keys, "final_layer.linear", patch * patch * 8, d)
    return keys


def udit_keys(depths: list[int], h: int, heads: int, classes: int) -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {}
    _conv(keys, "x_embedder.proj", h, 4, 3, 3)
    for i in (1, 2, 3):
        width = h * 2 ** (i - 1)
        _linear(keys, f"t_embedder_{i}.mlp.0", width, 256)
        _linear(keys, f"t_embedder_{i}.mlp.2", width, width)
        keys[f"y_embedder_{i}.embedding_table.weight"] = (classes + 1, width)
    _conv(keys, "down1_2.body.0", h // 2, h, 3, 3, bias=False)
    _conv(keys, "down2_3.body.0", h, 2 * h, 3, 3, bias=False)
    _conv(keys, "up3_2.body.0", 8 * h, 4 * h, 3, 3, bias=False)
    _conv(keys, "up2_1.body.0", 4 * h, 2 * h, 3, 3, bias=False)
    _conv(keys, "reduce_chan_level2", 2 * h, 4 * h, 1, 1)
    _conv(keys, "reduce_chan_level1", 2 * h, 2 * h, 1, 1)
    _conv(keys, "output", 2 * h, 2 * h, 3, 3)
    _linear(keys, "final_layer.adaLN_modulation.1", 4 * h, 2 * h)
    _conv(keys, "final_layer.out_proj", 8, 2 * h, 3, 3)
    for (stage, times), depth in zip(_STAGES.items(), depths, strict=True):
        c = times * h
        for i in range(depth):
            for n in (1, 2):
                b = f"{stage}.{i}"
                _linear(keys, f"{b}.adaLN_modulation{n}.1", 6 * c, c)
                _conv(keys, f"{b}.attn{n}.downsampler.layer", c, 1, 5, 5)
                _linear(keys, f"{b}.attn{n}.to_qkv", 3 * c, c)
                _conv(keys, f"{b}.attn{n}.to_out", c, c, 1, 1)
                keys[f"{b}.attn{n}.logit_scale"] = (heads, 1, 1)
                _conv(keys, f"{b}.mlp{n}.project_in.0", c, c, 1, 1)
                _conv(keys, f"{b}.mlp{n}.project_in.1", 2 * c, c, 1, 1)
                for k, size in enumerate((5, 3, 1)):
                    _conv(keys, f"{b}.mlp{n}.dwconv.{k}", 2 * c, 1, size, size)
                _conv(keys, f"{b}.mlp{n}.project_out.0", c, 2 * c, 1, 1)
                _conv(keys, f"{b}.mlp{n}.project_out.1", c, c, 1, 1)
    return keys


_STAGES = {
    "encoder_level_1": 1,
    "encoder_level_2": 2,
    "latent": 4,
    "decoder_level_2": 2,
    "decoder_level_1": 2,
}


def state(keys: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Random values of a size that leaves nothing invisible; the position table is the true one."""
    draw = torch.Generator().manual_seed(seed)
    full: State = {}
    for name, shape in keys.items():
        scale = 0.5 / math.sqrt(max(1, torch.Size(shape[1:]).numel()))
        full[name] = torch.randn(shape, generator=draw) * (0.3 if len(shape) == 1 else scale)
        if name.endswith("_norm.weight") or "logit_scale" in name:
            full[name] = full[name] + 1.0
    if "pos_embed" in keys:
        full["pos_embed"] = _positions(*keys["pos_embed"][1:])
    return full


def _positions(tokens: int, d: int) -> Tensor:
    grid, quarter = math.isqrt(tokens), d // 4
    table = torch.empty(1, tokens, d)
    for token in range(tokens):
        row, column = divmod(token, grid)
        for j in range(quarter):
            rate = 10_000 ** (-j / quarter)
            for half, place in ((0, column), (d // 2, row)):
                table[0, token, half + j] = math.sin(place * rate)
                table[0, token, half + quarter + j] = math.cos(place * rate)
    return table


def _apply(full: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, full[f"{name}.weight"], full.get(f"{name}.bias"))


def _waves(t: Tensor) -> Tensor:
    angle = t.float()[:, None] * 10_000 ** (-torch.arange(128) / 128)
    return torch.cat([angle.cos(), angle.sin()], -1)


def _condition(full: State, t: Tensor, y: Tensor, end: str = "") -> Tensor:
    time = F.silu(_apply(full, f"t_embedder{end}.mlp.0", _waves(t)))
    time = _apply(full, f"t_embedder{end}.mlp.2", time)
    return F.silu(time + full[f"y_embedder{end}.embedding_table.weight"][y])


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def dit(full: State, x: Tensor, t: Tensor, y: Tensor, heads: int) -> Tensor:
    """x: (B, 4, H, W) -> (B, 8, H, W), of DiT and of both kinds of DiT-MoE."""
    weight = full["x_embedder.proj.weight"]
    x = F.conv2d(x, weight, full["x_embedder.proj.bias"], stride=weight.shape[-1])
    grid, patch = x.shape[-1], weight.shape[-1]
    x = x.flatten(2).transpose(1, 2) + full["pos_embed"]
    c = _condition(full, t, y)
    depth = 1 + max(int(k.split(".")[1]) for k in full if k.startswith("blocks."))
    for b in (f"blocks.{i}" for i in range(depth)):
        chunks = _apply(full, f"{b}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        shift, scale, gate, shift2, scale2, gate2 = chunks
        x = x + gate * _attention(full, b, _norm(x) * (1 + scale) + shift, heads)
        x = x + gate2 * _feed_forward(full, b, _norm(x) * (1 + scale2) + shift2)
    shift, scale = _apply(full, "final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    x = _apply(full, "final_layer.linear", _norm(x) * (1 + scale) + shift)
    x = x.view(-1, grid, grid, patch, patch, 8)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, 8, grid * patch, grid * patch)


def _attention(full: State, b: str, x: Tensor, heads: int) -> Tensor:
    normed = f"{b}.attn.Wqkv.weight" in full
    qkv = _apply(full, f"{b}.attn.{'Wqkv' if normed else 'qkv'}", x)
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if normed:
        q, k = (
            F.layer_norm(
                z, z.shape[-1:], full[f"{b}.attn.{n}.weight"], full[f"{b}.attn.{n}.bias"], 1e-6
            )
            for z, n in ((q, "q_norm"), (k, "k_norm"))
        )
    x = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v
    return _apply(
        full, f"{b}.attn.{'out_proj' if normed else 'proj'}", x.transpose(1, 2).flatten(2)
    )


def _feed_forward(full: State, b: str, x: Tensor) -> Tensor:
    if f"{b}.mlp.fc1.weight" in full:
        x = F.gelu(_apply(full, f"{b}.mlp.fc1", x), approximate="tanh")
        return _apply(full, f"{b}.mlp.fc2", x)

    def swiglu(name: str) -> Tensor:
        gate, up = (_apply(full, f"{b}.moe.{name}.{p}_proj", x) for p in ("gate", "up"))
        return _apply(full, f"{b}.moe.{name}.down_proj", F.silu(gate) * up)

    score = _apply(full, f"{b}.moe.gate", x).softmax(-1)
    best = score.topk(2, -1).indices
    chosen = torch.zeros_like(score).scatter(-1, best, 1.0) * score
    out = swiglu("shared_experts")
    for e in range(score.shape[-1]):
        out = out + chosen[..., e : e + 1] * swiglu(f"experts.{e}")
    return out


def udit(full: State, x: Tensor, t: Tensor, y: Tensor, heads: int) -> Tensor:
    """x: (B, 4, H, W) -> (B, 8, H, W)."""
    c1, c2, c3 = (_condition(full, t, y, f"_{i}") for i in (1, 2, 3))

    def conv(name: str, x: Tensor) -> Tensor:
        weight = full[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(
            x, weight, full.get(f"{name}.bias"), padding=weight.shape[-1] // 2, groups=groups
        )

    def stage(name: str, x: Tensor, c: Tensor) -> Tensor:
        depth = 1 + max(int(k.split(".")[1]) for k in full if k.startswith(f"{name}."))
        for b, n in ((f"{name}.{i}", n) for i in range(depth) for n in (1, 2)):
            m = _apply(full, f"{b}.adaLN_modulation{n}.1", c)[:, :, None, None].chunk(6, 1)
            x = x + m[2] * attention(f"{b}.attn{n}", normed(x) * (1 + m[1]) + m[0])
            x = x + m[5] * mlp(f"{b}.mlp{n}", normed(x) * (1 + m[4]) + m[3])
        return x

    def normed(x: Tensor) -> Tensor:
        return _norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def mlp(b: str, x: Tensor) -> Tensor:
        z = F.gelu(conv(f"{b}.project_in.1", conv(f"{b}.project_in.0", x)))
        z = z + sum(conv(f"{b}.dwconv.{k}", z) for k in range(3))
        return conv(f"{b}.project_out.1", conv(f"{b}.project_out.0", z))

    def attention(b: str, x: Tensor) -> Tensor:
        x = x + conv(f"{b}.downsampler.layer", x)
        out = torch.empty_like(x)
        scale = full[f"{b}.logit_scale"].clamp(max=4.6052).exp()
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            part = x[:, :, dy::2, dx::2]
            side = part.shape[-1]
            qkv = _apply(full, f"{b}.to_qkv", part.flatten(2).transpose(1, 2))
            q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = F.normalize(_turn(q, side), dim=-1), F.normalize(_turn(k, side), dim=-1)
            z = (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v
            out[:, :, dy::2, dx::2] = z.permute(0, 1, 3, 2).flatten(1, 2).unflatten(2, (side, side))
        return conv(f"{b}.to_out", out)

    skip1 = stage("encoder_level_1", conv("x_embedder.proj", x), c1)
    skip2 = stage("encoder_level_2", F.pixel_unshuffle(conv("down1_2.body.0", skip1), 2), c2)
    x = stage("latent", F.pixel_unshuffle(conv("down2_3.body.0", skip2), 2), c3)
    x = torch.cat([F.pixel_shuffle(conv("up3_2.body.0", x), 2), skip2], 1)
    x = stage("decoder_level_2", conv("reduce_chan_level2", x), c2)
    x = torch.cat([F.pixel_shuffle(conv("up2_1.body.0", x), 2), skip1], 1)
    x = conv("output", stage("decoder_level_1", conv("reduce_chan_level1", x), c2))
    m = _apply(full, "final_layer.adaLN_modulation.1", c2)[:, :, None, None].chunk(2, 1)
    return conv("final_layer.out_proj", normed(x) * (1 + m[1]) + m[0])


def _turn(x: Tensor, side: int) -> Tensor:
    """Rotary positions. x: (B, heads, N, hd)."""
    token, pairs = torch.arange(side * side), x.shape[-1] // 2
    angle = torch.empty(side * side, pairs)
    for j in range(pairs):
        place: Any = token // side if j % 2 else token % side
        angle[:, j] = place * 10_000 ** (-4 * (j // 2) / x.shape[-1])
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)
