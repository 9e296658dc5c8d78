"""The gate of a SwiGLU in one pass each way, which keeps only what came in.

In C in eager mode for float32 on a CPU; else torch operators, which a compiler fuses.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.kernels import native
from parallel.kernels.operators import fake, operator


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate)·up, of one shape and dtype. Source: Shazeer, GLU Variants Improve Transformer."""
    assert gate.shape == up.shape, f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ"
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.ops.dit_pretrain.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.dit_pretrain.swiglu_backward(grads[0], *ctx.saved_tensors)


@operator("swiglu")
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    if not native.fits(gate, up):
        return F.silu(gate) * up
    y = torch.empty_like(gate)
    native.call("swiglu", gate, up, y, y.numel())
    return y


@operator("swiglu_backward")
def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    if not native.fits(grad, gate, up):
        of_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return of_gate, grad * F.silu(gate)
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    native.call("swiglu_backward", grad, gate, up, of_gate, of_up, grad.numel())
    return of_gate, of_up


@fake("swiglu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@fake("swiglu_backward")
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)
