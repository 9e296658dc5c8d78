"""Megatron Core's tensor parallel linears, and its `parallel_state` made from our mesh.

Used under DeepSpeed, from the same plan that `parallel.tensor` applies under FSDP2. Knows no model
and no ZeRO. Importing this module imports Megatron, which takes seconds: import it where the engine
is asked for.
"""

import warnings
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import Axis, Mesh
from parallel.tensor import cut_box, gather

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it misses Apex and Transformer Engine, which we do not use
    # why: its types are not to be built on: globals declared None, forwards that return tuples.
    parallel_state: Any = import_module("megatron.core.parallel_state")
    layers: Any = import_module("megatron.core.tensor_parallel.layers")
    from megatron.core.model_parallel_config import ModelParallelConfig
# why: it warns at every start of a setting that orders kernels, and concerns speed only.
layers.linear_with_grad_accumulation_and_async_allreduce.warned = True


class ParallelState:
    """Megatron's `parallel_state` by the names that DeepSpeed asks an `mpu` for."""

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group()

    def get_data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    def get_data_parallel_world_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()


def state(mesh: Mesh) -> ParallelState:
    """Tells Megatron of our groups. The mesh must have tp > 1 and dp_replicate = 1.

    Why not its own `initialize_model_parallel`: that makes a dozen communicators of its own, none
    with the world's timeout.
    """
    tp, data = mesh.tp.group, mesh.shard.get_group()
    assert tp is not None
    assert mesh.sizes.dp_replicate == 1
    parallel_state._TENSOR_MODEL_PARALLEL_GROUP = tp
    parallel_state._TENSOR_MODEL_PARALLEL_GLOBAL_RANKS = dist.get_process_group_ranks(tp)
    parallel_state._MODEL_PARALLEL_GROUP = tp
    parallel_state._DATA_PARALLEL_GROUP = data
    parallel_state._DATA_PARALLEL_GROUP_WITH_CP = data
    parallel_state._DATA_PARALLEL_GLOBAL_RANKS = dist.get_process_group_ranks(data)
    return ParallelState()


def column(whole: nn.Module, axis: Axis) -> nn.Module:
    """A linear on meta with its outputs cut, no communication of its own. (..., K) -> (..., N/tp).

    Why `disable_grad_reduce`: the gradient of the input is summed where the region was entered.
    """
    return _Column(whole, axis, enters=False)


def gathered(whole: nn.Module, axis: Axis) -> nn.Module:
    """A linear on meta with its outputs cut and gathered again. (..., K) -> (..., N)."""
    return _Gathered(whole, axis, enters=True)


def row(whole: nn.Module, axis: Axis) -> nn.Module:
    """A linear on meta with its inputs cut; outputs are summed. (..., K/tp) -> (..., N)."""
    return _Row(whole, axis)


class _Column(layers.ColumnParallelLinear):
    def __init__(self, whole: nn.Module, axis: Axis, *, enters: bool) -> None:
        assert isinstance(whole, nn.Linear)
        with torch.device("meta"):
            super().__init__(
                whole.in_features,
                whole.out_features,
                config=_config(axis),
                init_method=_none,
                bias=whole.bias is not None,
                disable_grad_reduce=not enters,
                tp_group=axis.group,
            )
        self.inits = whole.inits
        self.boxes = {
            name: cut_box(tuple(parameter.shape), 0, axis)
            for name, parameter in whole.named_parameters()
        }

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # its backward knows two and three dims only
        out, _ = super().forward(rows)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **rest: Any) -> Any:
        # why: masters are fp32, whatever the dtype of the computation.
        bias = None if bias is None else bias.to(input.dtype)
        return super()._forward_impl(input=input, weight=weight.to(input.dtype), bias=bias, **rest)


class _Gathered(_Column):
    def __init__(self, whole: nn.Module, axis: Axis, *, enters: bool) -> None:
        super().__init__(whole, axis, enters=enters)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        # why: Megatron's own gather allocates on CUDA only.
        return gather(super().forward(x), self.axis, -1)


class _Row(layers.RowParallelLinear):
    def __init__(self, whole: nn.Module, axis: Axis) -> None:
        assert isinstance(whole, nn.Linear)
        with torch.device("meta"):
            super().__init__(
                whole.in_features,
                whole.out_features,
                config=_config(axis),
                init_method=_none,
                bias=whole.bias is not None,
                input_is_parallel=True,
                skip_bias_add=True,
                tp_group=axis.group,
            )
        self.inits = whole.inits
        self.boxes = {"weight": cut_box(tuple(whole.weight.shape), 1, axis)}

    def forward(self, x: Tensor) -> Tensor:
        out, bias = super().forward(x.reshape(-1, x.shape[-1]))
        out = out.view(*x.shape[:-1], out.shape[-1])
        return out if bias is None else out + bias.to(x.dtype)

    def _forward_impl(self, input: Tensor, weight: Tensor, **rest: Any) -> Any:
        product = super()._forward_impl(input=input, weight=weight.to(input.dtype), **rest)
        # why: Megatron sums in place, and selective recomputation keeps the product itself.
        return product.clone()


def _config(axis: Axis) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=axis.size,
        use_cpu_initialization=True,  # on the device of the context: meta
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        params_dtype=torch.float32,
    )


def _none(_weight: Tensor) -> None:
    """Values come from `initialise`."""
