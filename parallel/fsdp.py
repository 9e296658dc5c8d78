"""FSDP2 as this stack uses it: a unit a block, gradients by SUM, fp32 masters, fp32 routers."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from parallel.mesh import Mesh
from parallel.precision import Precision, policy


def shard(
    model: nn.Module,
    units: Sequence[nn.Module],
    routers: Sequence[nn.Module],
    mesh: Mesh,
    precision: Precision,
    reshard_after_forward: bool,
) -> nn.Module:
    """Shards `model` in place over the data ranks; parameters become DTensors.

    units: the blocks, in the order of forward. routers: kept in fp32, gathered together once.
    """
    if routers:
        fully_shard(
            list(routers), mesh=mesh.shard, mp_policy=policy("fp32"), reshard_after_forward=False
        )
    for unit in units:
        fully_shard(
            unit,
            mesh=mesh.shard,
            mp_policy=policy(precision),
            reshard_after_forward=reshard_after_forward,
        )
    fully_shard(model, mesh=mesh.shard, mp_policy=policy(precision))
    for module in sharded_modules(model):
        # why: the loss is a sum ÷ the global batch, so gradients add; gloo has no average.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    return model


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def accumulate(model: nn.Module, *, last: bool) -> None:
    """Gradients are reduced on the last micro-batch only."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)


def regather(model: nn.Module) -> None:
    """Drops gathered weights: parameters are the shards again, the next forward gathers them anew.

    Why: after a forward without backward FSDP2 keeps the gathered copies of the root and of the
    routers, and shows those as the parameters; a change of the shards would not be seen.
    """
    for module in sharded_modules(model):
        module.reshard()


def materialise(model: nn.Module, device: torch.device) -> nn.Module:
    """Allocates this rank's shards of a model built on meta; values are undefined until filled."""
    return model.to_empty(device=device)
