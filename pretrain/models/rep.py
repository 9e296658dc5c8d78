"""The re-parameterised feed-forward of U-DiT: sums and products in training, one when merged.

Each part states what it merges to. Merging reads one part and writes another: nothing is changed in
place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers import Depthwise, Linear


class Factored(nn.Module):
    """Two linears with nothing between: one linear of the product when merged."""

    def __init__(self, inner: int, middle: int, outer: int) -> None:
        super().__init__()
        self.first = Linear(inner, middle)
        self.second = Linear(middle, outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def merge_to(self, out: Linear) -> None:
        """Give `out` the product."""
        one, two = self.first, self.second
        weight = two.weight.double() @ one.weight.double()
        bias = two.weight.double() @ one.bias.double() + two.bias.double()
        _give(out, weight.to(one.weight.dtype), bias.to(one.bias.dtype))


class Kernels(nn.Module):
    """x + depthwise 5×5 + 3×3 + 1×1 of x: one depthwise 5×5 when merged. (B, H, W, C) -> same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.five = Depthwise(width, 5)
        self.three = Depthwise(width, 3)
        self.one = Depthwise(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.five(x) + self.three(x) + self.one(x)

    def merge_to(self, out: Depthwise) -> None:
        """Give `out` the sum."""
        five, three, one = self.five, self.three, self.one
        weight = five.weight.double() + F.pad(three.weight.double(), (1, 1, 1, 1))
        weight = weight + F.pad(one.weight.double() + 1, (2, 2, 2, 2))
        biases = [part.bias for part in (five, three, one) if part.bias is not None]
        bias = torch.stack(biases).double().sum(0)
        _give(out, weight.to(five.weight.dtype), bias.to(five.weight.dtype))


class FeedForward(nn.Module):
    """1×1 to hidden, erf-GELU, depthwise mixing, 1×1 back. (B, H, W, C) -> the same."""

    def __init__(self, width: int, hidden: int, merged: bool) -> None:
        super().__init__()
        self.expand = Linear(width, hidden) if merged else Factored(width, width, hidden)
        self.mix = Depthwise(hidden, 5) if merged else Kernels(hidden)
        self.contract = Linear(hidden, width) if merged else Factored(hidden, width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.mix(F.gelu(self.expand(x))))


def _give(out: nn.Module, weight: Tensor, bias: Tensor) -> None:
    out.weight = nn.Parameter(weight)
    out.bias = nn.Parameter(bias)


@torch.no_grad()
def merge_into(source: nn.Module, target: nn.Module) -> None:
    """Give target, the merged form of source on meta, its tensors; source is only read."""
    match source, target:
        case Factored(), Linear():
            return source.merge_to(target)
        case Kernels(), Depthwise():
            return source.merge_to(target)
    assert type(source) is type(target), f"{type(source)} cannot be merged into {type(target)}"
    for name, tensor in source._parameters.items():
        if tensor is not None:
            target._parameters[name] = nn.Parameter(tensor.clone(), tensor.requires_grad)
    for name, tensor in source._buffers.items():
        if tensor is not None:
            target._buffers[name] = tensor.clone()
    for name, child in source.named_children():
        merge_into(child, target.get_submodule(name))
    return None
