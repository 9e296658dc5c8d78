"""Tensor parallelism: a model states once how its parts are cut, `apply` cuts them.

A module's `tensor_plan` maps paths below it to roles. Outside the cut regions the token stream is
whole and bitwise equal on all ranks of the axis; a region begins at an `enter` and ends at a `row`
or a `gathered`. Source: Megatron-LM, section 3. Under FSDP2 the cut parameters are DTensors of the
whole logical tensor; DeepSpeed gets plain local tensors, with their boxes, and Megatron's linears.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from parallel.clock import spending
from parallel.errors import LayoutError
from parallel.fp8.linear import linear
from parallel.fp8.product import Product
from parallel.mesh import Axis
from parallel.reduce import sum_over
from parallel.shards import Box

Role = Literal[
    "enter",  # an nn.Identity: where a whole stream enters a cut region
    "column",  # a leaf whose outputs are cut; no communication of its own
    "row",  # a linear whose inputs are cut; sums its outputs, then adds the bias
    "gathered",  # a leaf whose outputs are cut and gathered again; enters by itself
    "cut",  # a parameter, or all of a leaf's, cut on dim 0: depthwise kernels, scales of heads
]
Plan = Mapping[str, Role]  # below the module that states it; a part that is None is passed over


def part(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """What this rank holds of a parameter, in the dtype of the computation; differentiable."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).to(dtype)


def enter(x: Tensor, axis: Axis) -> Tensor:
    """A whole tensor into a cut region: identity; the gradient is summed over the axis."""
    return x if axis.size == 1 else _Enter.apply(x, axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums out of a cut region: summed over the axis; the gradient passes as it is."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Slices along `dim` to the whole; the gradient is this rank's slice."""
    return x if axis.size == 1 else _Gather.apply(x, axis, dim)


def scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The whole to this rank's slice along `dim`; the gradient is gathered."""
    return x if axis.size == 1 else _Scatter.apply(x, axis, dim)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_over(grads[0], ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return sum_over(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _gather(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _slice(grads[0], ctx.axis, ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _slice(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grads[0], ctx.axis, ctx.dim), None, None


def _gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    parts = x.new_empty(axis.size, *x.shape)
    with spending("communication"):
        dist.all_gather(list(parts.unbind()), x.contiguous(), group=axis.group)  # dist: the axis
    return torch.cat(parts.unbind(), dim=dim)


def _slice(x: Tensor, axis: Axis, dim: int) -> Tensor:
    assert x.shape[dim] % axis.size == 0, f"{tuple(x.shape)} is not cut evenly along {dim}"
    return x.chunk(axis.size, dim=dim)[axis.rank].contiguous()


class Enter(nn.Module):
    """`enter` in the place of an identity."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return enter(x, self.axis)


class Row(nn.Module):
    """A linear whose input features are cut. (..., K/tp) -> (..., N)."""

    weight: Tensor
    bias: Tensor | None
    fp8: Product | None = None

    def __init__(self, whole: nn.Module, axis: Axis, hold: "Hold") -> None:
        super().__init__()
        _take_over(self, whole, {"weight": 1}, axis, hold)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        out = reduce(linear(x, part(self.weight, x.dtype), None, self.fp8), self.axis)
        return out if self.bias is None else out + part(self.bias, x.dtype)


class Gathered(nn.Module):
    """A leaf whose output features are cut, and gathered: any layer with `compute` and `cuts`."""

    fp8: Product | None = None

    def __init__(self, whole: Any, axis: Axis, hold: "Hold") -> None:
        super().__init__()
        _take_over(self, whole, whole.cuts, axis, hold)
        self.compute: Callable[..., Tensor] = whole.compute
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():  # labels have no gradient
            x = enter(x, self.axis)
        own = {} if self.fp8 is None else {"fp8": self.fp8}
        return gather(self.compute(x, self.weight, self.bias, **own), self.axis, -1)


@dataclass(frozen=True)
class Hold:
    """How an engine wants cut parameters held, and which layers do the cut linears."""

    as_dtensor: bool
    column: Callable[[nn.Module, Axis], nn.Module] | None = None  # None: the leaf itself
    row: Callable[[nn.Module, Axis], nn.Module] | None = None  # None: `Row`
    gathered: Callable[[nn.Module, Axis], nn.Module] | None = None  # None: `Gathered`


DTENSOR = Hold(as_dtensor=True)


def apply(model: nn.Module, axis: Axis, hold: Hold = DTENSOR) -> None:
    """Cuts a model on meta, in place. Does nothing on an axis of size 1."""
    if axis.size == 1:
        return
    for owner, name, role in list(_planned(model)):
        whole = getattr(owner, name)
        if isinstance(whole, nn.Parameter):
            assert role == "cut"
            give_cut(owner, name, whole, 0, axis, hold)
        else:
            setattr(owner, name, _cut(whole, role, axis, hold))


def _planned(model: nn.Module) -> Iterator[tuple[nn.Module, str, Role]]:
    """Owner, name and role of everything that a plan in the model names."""
    for module in model.modules():
        plan: Plan = getattr(type(module), "tensor_plan", {})
        for path, role in plan.items():
            prefix, _, name = path.rpartition(".")
            owner = module.get_submodule(prefix)
            if getattr(owner, name) is not None:
                yield owner, name, role


def _cut(module: nn.Module, role: Role, axis: Axis, hold: Hold) -> nn.Module:
    linear = isinstance(module, nn.Linear)
    match role:
        case "enter":
            assert isinstance(module, nn.Identity)
            return Enter(axis)
        case "row":
            return hold.row(module, axis) if hold.row else Row(module, axis, hold)
        case "gathered" if linear and hold.gathered:
            return hold.gathered(module, axis)
        case "gathered":
            return Gathered(module, axis, hold)
        case "column" if linear and hold.column:
            return hold.column(module, axis)
    _take_over(module, module, dict.fromkeys(module._parameters, 0), axis, hold)
    return module


def _take_over(
    target: nn.Module, whole: nn.Module, cuts: Mapping[str, int], axis: Axis, hold: Hold
) -> None:
    """Gives target the parameters of `whole` and their starts, those in `cuts` cut on that dim."""
    for name, parameter in list(whole._parameters.items()):
        if parameter is not None and name in cuts:
            give_cut(target, name, parameter, cuts[name], axis, hold)
        else:
            target.register_parameter(name, parameter)
    target.inits = whole.inits


def give_cut(module: nn.Module, name: str, whole: Tensor, dim: int, axis: Axis, hold: Hold) -> None:
    """Makes `module.name` this rank's share of a parameter on meta, held as the engine wants it."""
    box = cut_box(tuple(whole.shape), dim, axis)
    share = torch.empty(box.sizes, dtype=whole.dtype, device=whole.device)
    if hold.as_dtensor:
        share = DTensor.from_local(
            share,
            axis.mesh,
            [Shard(dim)],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
    else:
        # why: a plain share does not say of itself where it lies.
        vars(module).setdefault("boxes", {})[name] = box
    module.register_parameter(name, nn.Parameter(share))


def cut_box(shape: tuple[int, ...], dim: int, axis: Axis) -> Box:
    """This rank's even share of a tensor along `dim`."""
    size = shape[dim] // axis.size
    offset = tuple(axis.rank * size if d == dim else 0 for d in range(len(shape)))
    return Box(shape, offset, tuple(size if d == dim else n for d, n in enumerate(shape)))


def cuts(model: nn.Module) -> dict[int, int]:
    """The dim on which each cut parameter of a whole model is cut, by the parameter's id."""
    found = {}
    for owner, name, role in _planned(model):
        whole = getattr(owner, name)
        if isinstance(whole, nn.Parameter):
            found[id(whole)] = 0
            continue
        dims = {"weight": 1} if role == "row" else getattr(whole, "cuts", {})
        for own, parameter in whole._parameters.items():
            if parameter is not None and own in dims:
                found[id(parameter)] = dims[own]
    return found


def check(model: nn.Module, size: int) -> None:
    """Raises LayoutError if an axis of `size` does not cut evenly what the plans want cut."""
    if size == 1:
        return
    dims = cuts(model)
    for path, parameter in model.named_parameters():
        dim = dims.get(id(parameter))
        if dim is None or parameter.shape[dim] % size == 0:
            continue
        good = max(d for d in range(1, size) if parameter.shape[dim] % d == 0)
        raise LayoutError(
            f"mesh.tp={size} does not divide dim {dim} of {path}, which has shape "
            f"{tuple(parameter.shape)}; set mesh.tp={good}, or change the model's sizes"
        )
