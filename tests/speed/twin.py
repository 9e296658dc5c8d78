"""A plain U-DiT on the weights of ours, as models.md §3 describes the published one: eager, SDPA,
NCHW `Conv2d` throughout, 1×1 factors and depthwise kernels apart. And experts in a Python loop.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.kernels.heads import rotate
from pretrain.models.attention import MAX_LOG_SCALE
from pretrain.models.layers import AdaLN, Block, Conditioning, sinusoid
from pretrain.models.moe import MoE
from pretrain.models.rep import Factored
from pretrain.models.udit import Stage, UDiT


def forward(model: UDiT, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """What the model predicts. x_t: (B, C, H, W); t, labels: (B,)."""
    waves = sinusoid(t)
    c1, c2, c3 = (c(waves, labels) for c in (model.condition1, model.condition2, model.condition3))
    skip1 = _stage(model.enc1, _conv(model.stem, x_t), c1)
    skip2 = _stage(model.enc2, F.pixel_unshuffle(_conv(model.down1.conv, skip1), 2), c2)
    x = _stage(model.latent, F.pixel_unshuffle(_conv(model.down2.conv, skip2), 2), c3)
    x = torch.cat([F.pixel_shuffle(_conv(model.up2.conv, x), 2), skip2], 1)
    x = _stage(model.dec2, _point(model.reduce2, x), c2)
    x = torch.cat([F.pixel_shuffle(_conv(model.up1.conv, x), 2), skip1], 1)
    x = _stage(model.dec1, _point(model.reduce1, x), c2)
    shift, scale = _chunks(model.head.adaln, c2)
    return _conv(model.head.out, _modulate(_conv(model.head.conv, x), shift, scale))


def _conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)


def _point(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def _chunks(adaln: AdaLN, cond: Conditioning) -> tuple[Tensor, ...]:
    return tuple(v.flatten(1)[:, :, None, None] for v in adaln(cond, 4))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
    return normed * (1 + scale) + shift


def _stage(stage: Stage, x: Tensor, cond: Conditioning) -> Tensor:
    for pair in stage.blocks:
        for block in (pair.first, pair.second):
            x = _block(block, x, cond, stage.rope())
    return x


def _block(block: Block, x: Tensor, cond: Conditioning, rope: Tensor) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = _chunks(block.adaln, cond)
    x = x + gate1 * _attention(block.attn, _modulate(x, shift1, scale1), rope)
    ffn, mix = block.ffn, block.ffn.mix
    z = F.gelu(_factored(ffn.expand, _modulate(x, shift2, scale2)))
    z = z + _conv(mix.five, z) + _conv(mix.three, z) + _conv(mix.one, z)
    return x + gate2 * _factored(ffn.contract, z)


def _factored(pair: Factored, x: Tensor) -> Tensor:
    return _point(pair.second, _point(pair.first, x))


def _attention(attn: nn.Module, x: Tensor, rope: Tensor) -> Tensor:
    core = attn.core
    x = x + _conv(attn.mix, x)
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 3, 5, 2, 4, 1)
    x = x.reshape(4 * batch, -1, channels)
    weight = torch.cat([core.q.weight, core.k.weight, core.v.weight])
    bias = torch.cat([core.q.bias, core.k.bias, core.v.bias])
    q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, -1, core.head_dim)).unbind(2)
    scale = core.logit_scale.clamp(max=MAX_LOG_SCALE).exp()[:, None]
    q, k = F.normalize(rotate(q, rope), dim=-1) * scale, F.normalize(rotate(k, rope), dim=-1)
    x = F.scaled_dot_product_attention(*(h.transpose(1, 2) for h in (q, k, v)), scale=1.0)
    x = x.transpose(1, 2).reshape(batch, 2, 2, height // 2, width // 2, channels)
    x = x.permute(0, 5, 3, 1, 4, 2).reshape(batch, channels, height, width)
    return _point(core.out, x)


class LoopedExperts(nn.Module):
    """The routed experts of a layer, one weight tensor an expert, one expert after another."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.router = layer.router
        held = (layer.experts.gate, layer.experts.up, layer.experts.down)
        self.gate, self.up, self.down = (
            nn.ParameterList(nn.Parameter(w.detach().clone()) for w in stack) for stack in held
        )

    def forward(self, x: Tensor, normed: Tensor, time: Tensor) -> Tensor:
        """As `MoE`, without a shared expert."""
        picks, _ = self.router(normed, time)
        tokens = x.flatten(0, -2)
        places, outs = [], []
        for e, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            at = (picks.experts == e).nonzero()[:, 0]
            rows = tokens[picks.tokens[at]]
            outs.append((F.silu(rows @ gate.T) * (rows @ up.T)) @ down.T)
            places.append(at)
        at = torch.cat(places)
        weighted = torch.cat(outs) * picks.weights[at, None]
        out = torch.zeros_like(tokens).index_add(0, picks.tokens[at], weighted)
        return out.view(x.shape)
