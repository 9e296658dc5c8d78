"""Keeping experts evenly loaded: auxiliary losses from a forward's routing, and the bias update.

A layer's routing is data (`Routing`), given back by the model; nothing here looks into the model.
Source: batch-wise loss: Switch Transformers, Eq. 4-6, as DiT-MoE; bias: Auxiliary-Loss-Free Load
Balancing; z-loss: ST-MoE, Eq. 5.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pretrain.models.moe import MoEConfig, Routing


def auxiliary_loss(
    cfg: MoEConfig,
    routings: Sequence[Routing],
    *,
    global_batch: int,
    everywhere: Callable[[Tensor], Tensor],
) -> Tensor:
    """This rank's share of the balancing losses of one micro-batch, (); shares of all ranks add up.

    everywhere: sums a tensor over all data ranks. The batch-wise loss is taken over the micro-batch
    of all ranks: it does not know the layout, but it does know the accumulation. The per-image loss
    and the z-loss know neither.
    """
    total = routings[0].probs.new_zeros(())
    # why: shares of a token sum to 1; layers may see images of different sizes.
    tokens = torch.stack([r.probs[0].detach().sum().round() for r in routings])  # (L,), an image
    scale = 1 / (tokens * global_batch)
    if cfg.aux_batch:
        local = torch.stack([r.counts.sum(dim=0) for r in routings])  # (L, E)
        # dist: every data rank, once a micro-batch
        counts = everywhere(local.flatten()).view_as(local)
        share = cfg.experts * counts / counts.sum(dim=1, keepdim=True)  # f_e
        probs = torch.stack([r.probs.sum(dim=0) for r in routings])  # (L, E)
        total = total + cfg.aux_batch * ((share * probs).sum(1) * scale).sum()
    if cfg.aux_image:
        for routing, one in zip(routings, scale, strict=True):
            picks = routing.counts.sum(dim=1, keepdim=True)  # of an image
            share = cfg.experts * routing.counts / picks
            total = total + cfg.aux_image * (share * routing.probs).sum() * one
    if cfg.z_loss:
        z = torch.stack([r.z.sum() for r in routings])
        total = total + cfg.z_loss * (z * scale).sum()
    return total


def update_biases(biases: Sequence[Tensor], counts: Tensor, rate: float, skip: Tensor) -> None:
    """One step of the balance bias of every layer, in place.

    biases: L of (E,) fp32. counts: (L, E), picks over the whole global batch. skip: (), true leaves
    the biases bit-identical. bias += rate·sign(mean − count), then zero mean.
    """
    old = torch.stack(list(biases))
    push = torch.sign(counts.mean(dim=1, keepdim=True) - counts).to(old.dtype)
    new = old + rate * push
    new = new - new.mean(dim=1, keepdim=True)
    new = torch.where(skip, old, new)
    for bias, value in zip(biases, new, strict=True):
        bias.copy_(value)


def by_time(routings: Sequence[Routing], bins: Tensor, num_bins: int) -> Tensor:
    """Picks per layer, timestep bin and expert, (L, T, E) float64. bins: (B,) int64."""
    # why: `one_hot` looks at the largest value, which waits for the device.
    member = (bins[:, None] == torch.arange(num_bins, device=bins.device)).double()  # (B, T)
    return torch.stack([member.t() @ r.counts.double() for r in routings])
