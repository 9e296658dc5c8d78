"""The re-parameterised feed-forward of U-DiT: sums and products in training, one when merged.

Each part states what it merges to. Merging reads one part and writes another: nothing is changed in
place.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.kernels.depthwise import mix
from parallel.tensor import Plan, part
from pretrain.models.layers import Depthwise, Linear

# trained: what runs; published: the same with its kernels apart, for counts; merged: for inference.
Form = Literal["trained", "published", "merged"]


def pays(tokens: int, inner: int, middle: int, outer: int) -> bool:
    """Whether a pair of linears costs fewer MACs as one of the product, made for so many tokens."""
    return tokens * inner * outer + inner * middle * outer < tokens * middle * (inner + outer)


class Factored(nn.Module):
    """Two linears with nothing between: one linear of the product when merged.

    In training the product is made on the fly where that costs fewer MACs, which the shapes alone
    decide (`pays`); gradients reach the factors through it. Not where tensor parallelism cuts the
    factors or FP8 multiplies by them, and not `apart`, the published graph.
    """

    fp8_products: ClassVar = ("first", "second")

    def __init__(self, inner: int, middle: int, outer: int, apart: bool = False) -> None:
        super().__init__()
        self.apart = apart
        self.first = Linear(inner, middle)
        self.enter = nn.Identity()
        self.second = Linear(middle, outer)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first, self.second
        whole = type(first) is Linear and type(second) is Linear
        plain = first.fp8 is None and second.fp8 is None if whole else False
        middle, inner = first.weight.shape
        outer = len(second.weight)
        if self.apart or not plain or not pays(x.numel() // x.shape[-1], inner, middle, outer):
            return second(self.enter(first(x)))
        one, two = part(first.weight, x.dtype), part(second.weight, x.dtype)
        bias = F.linear(part(first.bias, x.dtype), two, part(second.bias, x.dtype))
        return F.linear(x, two @ one, bias)

    def merge_to(self, out: Linear) -> None:
        """Give `out` the product."""
        one, two = self.first, self.second
        weight = two.weight.double() @ one.weight.double()
        bias = two.weight.double() @ one.bias.double() + two.bias.double()
        _give(out, weight.to(one.weight.dtype), bias.to(one.bias.dtype))


class Kernels(nn.Module):
    """x + depthwise 5×5, 3×3 and 1×1 of x: one depthwise 5×5 when merged. (B, H, W, C) -> same.

    The three kernels are summed first and applied at once, which has the same values and gradients;
    `apart` applies them one by one, the published graph, for counting its MACs.
    """

    tensor_plan: ClassVar[Plan] = {"five": "cut", "three": "cut", "one": "cut"}

    def __init__(self, width: int, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        self.five = Depthwise(width, 5)
        self.three = Depthwise(width, 3)
        self.one = Depthwise(width, 1)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """gelu: x passes an erf-GELU first."""
        if self.apart:
            x = F.gelu(x) if gelu else x
            return x + self.five(x) + self.three(x) + self.one(x)
        # why: x stays outside, because 1 + weight in bf16 would lose the weight.
        return mix(x, *self._sum(torch.float32), gelu=gelu)  # those of this rank's channels

    def _sum(self, least: torch.dtype) -> tuple[Tensor, Tensor]:
        parts = (self.five, self.three, self.one)
        dtype = torch.promote_types(least, parts[0].weight.dtype)
        five, three, one = (F.pad(part(p.weight, dtype), (i,) * 4) for i, p in enumerate(parts))
        # why: added, not stacked and summed. Autograd gives the parts of a stack views of one
        # gradient, and a second micro-batch would then be added to that memory three times.
        biases = [part(p.bias, dtype) for p in parts if p.bias is not None]
        return five + three + one, biases[0] + biases[1] + biases[2]

    def merge_to(self, out: Depthwise) -> None:
        """Give `out` the sum."""
        weight, bias = self._sum(torch.float64)
        weight[:, :, 2, 2] += 1
        dtype = self.five.weight.dtype
        _give(out, weight.to(dtype), bias.to(dtype))


class FeedForward(nn.Module):
    """1×1 to hidden, erf-GELU, depthwise mixing, 1×1 back. (B, H, W, C) -> the same."""

    tensor_plan: ClassVar[Plan] = {  # of the trained form
        "expand.first": "gathered",
        "expand.enter": "enter",
        "expand.second": "column",
        "contract.first": "row",
        "contract.second": "gathered",
    }

    def __init__(self, width: int, hidden: int, form: Form) -> None:
        super().__init__()
        merged = form == "merged"
        apart = form == "published"
        self.expand = Linear(width, hidden) if merged else Factored(width, width, hidden, apart)
        self.mix = Depthwise(hidden, 5) if merged else Kernels(hidden, apart)
        self.contract = Linear(hidden, width) if merged else Factored(hidden, width, width, apart)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(x)
        if isinstance(self.mix, Kernels) and not self.mix.apart:
            return self.contract(self.mix(hidden, gelu=True))
        return self.contract(self.mix(F.gelu(hidden)))


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
