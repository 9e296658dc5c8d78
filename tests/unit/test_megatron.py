"""Megatron's linears in the place of ours: values, gradients, boxes, dtypes; its parallel state."""

import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel import launch, remat
from parallel.mesh import Axis, Degrees, Mesh
from parallel.shards import Box
from parallel.tensor import enter
from tests import ranks

K, N = 6, 8
Mode = Literal["none", "full", "selective"]
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def whole(inner: int, outer: int, bias: bool) -> nn.Linear:
    torch.manual_seed(inner)
    linear = nn.Linear(inner, outer, bias=bias)
    linear.inits = {"weight": 1, "bias": 2}
    return linear


def cut(make: Callable[[nn.Linear, Axis], nn.Module], linear: nn.Linear, axis: Axis) -> nn.Module:
    """A share made from a linear on meta, then given its part of the values."""
    with torch.device("meta"):
        on_meta = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    on_meta.inits = linear.inits
    share = make(on_meta, axis)
    assert share.inits is linear.inits
    assert all(p.is_meta and p.dtype == torch.float32 for p in share.parameters())
    assert [n for n, _ in share.named_parameters()] == [n for n, _ in linear.named_parameters()]
    assert not list(share.buffers())
    share.to_empty(device="cpu")
    for name, parameter in share.named_parameters():
        parameter.data.copy_(part_of(getattr(linear, name).detach(), share.boxes.get(name)))
    return share


def part_of(tensor: Tensor, box: Box | None) -> Tensor:
    if box is None:
        return tensor
    assert box.shape == tensor.shape
    return tensor[tuple(slice(o, o + n) for o, n in zip(box.offset, box.sizes, strict=True))]


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == theirs.shape
    off = float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm())
    assert off <= TOLERANCES[dtype], f"off by {off:.1e} in {dtype}"


class Region(nn.Module):
    """A cut region, and a gathered linear behind it."""

    def __init__(self, shares: Sequence[nn.Module], axis: Axis) -> None:
        super().__init__()
        self.up, self.down, self.last = shares
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.down(self.up(enter(x, self.axis)).tanh()).tanh())


def compare(
    megatron: Any, axis: Axis, dtype: torch.dtype, dims: int, bias: bool, mode: Mode = "none"
) -> None:
    """A region against three whole linears in float32."""
    linears = [whole(K, N, bias), whole(N, K, bias), whole(K, N, bias)]
    makes = (megatron.column, megatron.row, megatron.gathered)
    shares = [cut(make, linear, axis) for make, linear in zip(makes, linears, strict=True)]
    torch.manual_seed(0)
    x = torch.randn(*range(2, dims + 1), K).to(dtype)
    theirs, ours = x.float().clone().requires_grad_(), x.clone().requires_grad_()
    up, down, last = linears
    want = last(down(up(theirs).tanh()).tanh())
    region = Region(shares, axis)
    remat.apply([region], remat.RematConfig(mode=mode))
    got = region(ours)
    assert got.dtype == dtype
    close(got.float(), want, dtype)
    grad = torch.randn_like(want).to(dtype)
    want.backward(grad.float())
    got.backward(grad)
    close(ours.grad.float(), theirs.grad, dtype)
    for share, linear in zip(shares, linears, strict=True):
        for name, parameter in share.named_parameters():
            assert parameter.grad.dtype == torch.float32
            close(parameter.grad, part_of(getattr(linear, name).grad, share.boxes.get(name)), dtype)


def body() -> None:
    from parallel import megatron

    launch.join(launch.Place.here(), threads=1, timeout=timedelta(seconds=60))
    mesh = Mesh(Degrees(dp_shard=1, tp=2), "cpu")
    with mock.patch.object(dist, "new_group", side_effect=AssertionError("a group of its own")):
        state = megatron.state(mesh)
    assert state.get_model_parallel_group() is mesh.tp.group
    assert (state.get_model_parallel_rank(), state.get_model_parallel_world_size()) == (
        mesh.rank,
        2,
    )
    assert (state.get_data_parallel_rank(), state.get_data_parallel_world_size()) == (0, 1)
    share = megatron.row(whole(N, K, True), mesh.tp)
    assert share.boxes == {"weight": Box((K, N), (0, mesh.tp.rank * N // 2), (K, N // 2))}
    for dtype, dims, bias in itertools.product(TOLERANCES, (2, 3, 4), (True, False)):
        compare(megatron, mesh.tp, dtype, dims, bias)
    for mode in ("full", "selective"):
        compare(megatron, mesh.tp, torch.float32, 3, True, mode)
    launch.leave()


def test_linears_equal_whole_ones() -> None:
    ranks.run(body, 2)
