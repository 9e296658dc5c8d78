"""FSDP2 as this stack uses it: gradients by SUM, fp32 masters in pieces, fp32 routers, experts on
their own view of the ranks.

FSDP2 cuts over `dp_shard` only. Replicas are ours: after backward each reduces the part of every
shard that it owns, updates it, and gathers the rest. So masters, moments and averages are shared
over all data ranks, and the sum over replicas has one order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor, Shard

from parallel import clock
from parallel.mesh import Mesh
from parallel.precision import COMPUTE, Precision, policy
from parallel.shards import Extent, Piece, box_of, local

_BUCKET = 64 << 20  # bytes exchanged between replicas at a time


@dataclass(frozen=True)
class Parts:
    """What FSDP needs to know of a model's structure."""

    units: Sequence[nn.Module]  # blocks, in the order of forward
    routers: Sequence[nn.Module]  # computed in fp32 whatever the precision
    experts: Sequence[nn.Module]  # cut over the expert view


def shard(
    model: nn.Module,
    parts: Parts,
    mesh: Mesh,
    precision: Precision,
    *,
    reshard_after_forward: bool,
    offload: bool = False,
    unit_bytes: int = 0,
) -> nn.Module:
    """Cuts `model` in place over the data ranks; parameters become DTensors, on any device.

    unit_bytes: neighbouring units smaller than this together are gathered as one.
    """
    pinned = torch.cuda.is_available()
    offloading = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    common: dict[str, Any] = {"offload_policy": offloading, "mp_policy": policy(precision)}
    if parts.routers:
        fully_shard(
            list(parts.routers),
            mesh=mesh.shard,
            mp_policy=policy("fp32"),
            offload_policy=offloading,
            reshard_after_forward=False,
        )
        _gather_around(model, model, _fsdp(parts.routers[0]))
    common["reshard_after_forward"] = reshard_after_forward
    experts = {p for module in parts.experts for p in module.parameters()}
    apart = mesh.experts is not mesh.shard
    together = groups(parts.units, unit_bytes, COMPUTE[precision].itemsize)
    for group in together:
        if apart:
            inside = {module for unit in group for module in unit.modules()}
            own = [module for module in parts.experts if module in inside]
            if own:
                cut = _expert_cut(experts, mesh.experts.size())
                fully_shard(own, mesh=mesh.experts, shard_placement_fn=cut, **common)
                _gather_around(group[0], group[-1], _fsdp(own[0]))
        cut = _expert_cut(experts, mesh.shard.size())
        fully_shard(group, mesh=mesh.shard, shard_placement_fn=cut, **common)
    for group, after in zip(together, together[1:], strict=False):
        _fsdp(group[0]).set_modules_to_forward_prefetch([_fsdp(after[0])])
    fully_shard(model, mesh=mesh.shard, **(common | {"reshard_after_forward": False}))
    for module in sharded_modules(model):
        # why: the loss is a sum ÷ the global batch, so gradients add; gloo has no average.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
        if mesh.ordered:
            module.set_custom_reduce_scatter(OrderedReduceScatter())
        _time_collectives(module)
    return model


def _time_collectives(module: FSDPModule) -> None:
    """Gathers and scatters of a module, and what waits for them, count as communication."""
    state = module._get_fsdp_state()
    # why: torch 2.13 has a list of groups, torch 2.11 one.
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        if group is not None:
            for name in ("unshard", "wait_for_unshard", "post_backward", "finalize_backward"):
                setattr(group, name, clock.spends("communication")(getattr(group, name)))


def _gather_around(first: nn.Module, last: nn.Module, inner: FSDPModule) -> None:
    """Gathers `inner` where `first` begins and frees it where `last` ends, not at its own calls.

    Why: inside a unit a gather would be traced by a compiler, which cannot, and called again by
    what recomputes the unit, in backward, where these weights are gathered ahead, or not at all.
    """
    state = inner._get_fsdp_state()
    for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
        handle.remove()
    # why: behind the hook of `first` itself, which knows the root of all states.
    first.register_forward_pre_hook(state._pre_forward, with_kwargs=True)
    last.register_forward_hook(state._post_forward)


def groups(units: Sequence[nn.Module], least: int, itemsize: int) -> list[list[nn.Module]]:
    """Neighbours together until they have `least` bytes to gather."""
    found: list[list[nn.Module]] = []
    held = least
    for unit in units:
        if held >= least:
            found.append([])
            held = 0
        found[-1].append(unit)
        held += sum(local(p).numel() for p in unit.parameters()) * itemsize
    return found


def _expert_cut(experts: set[nn.Parameter], ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """The first dim of an expert tensor that the ranks divide; dim 0 for all others.

    Why: with more ranks than experts a cut of dim 0 leaves ranks with nothing to hold.
    """

    def cut(parameter: nn.Parameter) -> Shard | None:
        if parameter not in experts:
            return None
        sizes = local(parameter).shape
        return Shard(next((dim for dim, size in enumerate(sizes) if size % ranks == 0), 0))

    return cut


def _fsdp(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class OrderedReduceScatter(ReduceScatter):
    """Reduce-scatter as an all-to-all and a sum in rank order: the same bits on any topology."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)  # dist: the shard group
        torch.sum(parts.view(group.size(), -1), dim=0, out=output_tensor)


class FSDP:
    """A sharded, allocated and filled model behind the engines' face."""

    def __init__(self, model: nn.Module, mesh: Mesh, device: torch.device) -> None:
        self.model = model
        self.device = device
        self._mesh = mesh
        for module in sharded_modules(model):
            # why: FSDP moves unevenly cut shards to padded memory when a module is first used; the
            # pieces must be views of where they stay.
            module.unshard()  # dist: once, at the start
            module.reshard()
        self._shards = {name: local(p).view(-1) for name, p in model.named_parameters()}
        self.pieces: Mapping[str, Piece] = pieces(model, mesh)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        _fsdp(self.model).set_requires_gradient_sync(last)
        loss.backward()

    def gradients(self) -> dict[str, Tensor]:
        shards = {name: _gradient(name, p) for name, p in self.model.named_parameters()}
        return shards if self._mesh.replicate.size == 1 else self._over_replicas(shards)

    def step(self, update: Callable[[], None]) -> None:
        update()
        self.forget()
        self.publish()

    def forget(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def publish(self) -> None:
        """Why reshard: after a forward without backward FSDP keeps the gathered copies of the root
        and of the routers, and a change of the shards would not be seen.
        """
        if self._mesh.replicate.size > 1:
            self._gather_replicas()
        for module in sharded_modules(self.model):
            module.reshard()

    @clock.spends("communication")
    @torch.no_grad()
    def _over_replicas(self, shards: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each replica's own interval of every gradient, summed over replicas in their order."""
        axis, reduced = self._mesh.replicate, {}
        for names in self._buckets():
            sent = [[_interval(shards[n], r, axis.size) for n in names] for r in range(axis.size)]
            to = [sum(part.numel() for part in parts) for parts in sent]
            mine, flat = to[axis.rank], torch.cat([part for parts in sent for part in parts])
            parts = flat.new_empty(axis.size, mine)
            dist.all_to_all_single(  # dist: the replicas of this shard, a bucket each
                parts.view(-1), flat, [mine] * axis.size, to, group=axis.group
            )
            total = parts.sum(dim=0)
            sizes = [self.pieces[n].values.numel() for n in names]
            reduced |= dict(zip(names, total.split(sizes), strict=True))
        return reduced

    @clock.spends("communication")
    @torch.no_grad()
    def _gather_replicas(self) -> None:
        axis = self._mesh.replicate
        for names in self._buckets():
            mine = torch.cat([self.pieces[n].values for n in names])
            # why: intervals of replicas differ by a value a tensor; a gather wants them even.
            most = sum(-(-self._shards[n].numel() // axis.size) for n in names)
            parts = mine.new_empty(axis.size, most)
            parts[axis.rank, : mine.numel()] = mine
            dist.all_gather(list(parts), parts[axis.rank].clone(), group=axis.group)  # dist: same
            for rank, part in enumerate(parts):
                wanted = [_interval(self._shards[n], rank, axis.size) for n in names]
                sizes = [w.numel() for w in wanted]
                for target, values in zip(wanted, part[: sum(sizes)].split(sizes), strict=True):
                    target.copy_(values)

    def _buckets(self) -> Iterator[list[str]]:
        """Names in order, so many at a time that a bucket is about `_BUCKET` bytes."""
        names, held = [], 0
        for name, shard in self._shards.items():
            names.append(name)
            held += shard.numel() * shard.element_size()
            if held >= _BUCKET:
                yield names
                names, held = [], 0
        if names:
            yield names


def pieces(model: nn.Module, mesh: Mesh) -> dict[str, Piece]:
    """What this rank owns of every parameter of a sharded model, by name; on meta too."""
    return {name: _piece(p, local(p).view(-1), mesh) for name, p in model.named_parameters()}


def _piece(parameter: Tensor, shard: Tensor, mesh: Mesh) -> Piece:
    box, axis = box_of(parameter), mesh.replicate
    assert isinstance(parameter, DTensor)
    assert box.numel == shard.numel(), f"{box} holds {shard.numel()} values"
    start, stop = _bounds(shard.numel(), axis.rank, axis.size)
    # why: what lies on the dense shard axis alone is the same on all ranks of a tp group.
    alone = parameter.device_mesh.mesh_dim_names == mesh.shard.mesh_dim_names
    counted = not alone or mesh.tp.rank == 0
    return Piece(shard[start:stop], Extent(box, start, stop), counted)


def _bounds(size: int, rank: int, ranks: int) -> tuple[int, int]:
    return size * rank // ranks, size * (rank + 1) // ranks


def _interval(shard: Tensor, rank: int, ranks: int) -> Tensor:
    start, stop = _bounds(shard.numel(), rank, ranks)
    return shard[start:stop]


def _gradient(name: str, parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, f"{name} got no gradient: it is not part of the loss"
    return local(parameter.grad).reshape(-1)


def materialise(model: nn.Module, device: torch.device, *, offload: bool = False) -> nn.Module:
    """Allocates this rank's shards of a model built on meta; values are undefined until filled.

    offload: parameters in CPU memory, buffers on the device.
    """
    model.to_empty(device=torch.device("cpu") if offload else device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model
