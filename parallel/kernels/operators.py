"""How the kernels become operators of torch: by their annotations, once for all devices.

    @operator("mix")
    def _mix(x: Tensor, weight: Tensor) -> Tensor: ...          # torch.ops.dit_pretrain.mix

Nothing is differentiated here: the autograd.Functions that call the operators do.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

_LIBRARY = torch.library.Library("dit_pretrain", "FRAGMENT")
Function = TypeVar("Function", bound=Callable[..., object])


def operator(name: str) -> Callable[[Function], Function]:
    """Registers a function of new results under torch.ops.dit_pretrain; gives it back as it is.

    perf: torch.library.custom_op puts layers of Python around every call, and a step of U-DiT-S
    makes 618 of them.
    """

    def register(function: Function) -> Function:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


def fake(name: str) -> Callable[[Function], Function]:
    """Registers what gives the shapes and dtypes of an operator's results."""
    return torch.library.register_fake(f"dit_pretrain::{name}")
