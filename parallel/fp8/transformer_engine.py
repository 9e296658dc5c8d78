"""Transformer Engine's kernels under our scales and states. Version 2.4 or newer, Hopper or newer.

Its modules own their weights, histories and collectives, which neither gathered bf16 weights nor
layout-free checkpoints allow. So the floor below is used: quantizers that take a scale, the cast
and transpose they do at once, `general_gemm`, and cuDNN's FP8 attention. Experts use torch's scaled
grouped product: Transformer Engine's wants row counts on the host. Not run here for want of a GPU:
tests hold the calls against a stand-in. Source: transformer_engine.pytorch's documentation.
"""

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.fp8 import recipes
from parallel.fp8.product import (
    GRADIENT,
    INPUTS,
    LOGITS,
    OUT,
    TO_INPUTS,
    G,
    How,
    Product,
    W,
    X,
    maximum,
)
from parallel.fp8.recipes import E4M3, E5M2, scale_of

ROWS = 16  # values; every dim of its products is a multiple


class _Engine(NamedTuple):
    """What is used of the package."""

    gemm: Callable[..., Any]
    whole: Callable[..., Any]  # quantizers
    tiles: Callable[..., Any]
    dtypes: dict[torch.dtype, Any]


@cache
def _engine() -> _Engine:
    gemm = _with_workspace(_part("cpp_extensions").general_gemm)
    whole = _part("tensor.float8_tensor").Float8Quantizer
    tiles = _part("tensor.float8_blockwise_tensor").Float8BlockQuantizer
    return _Engine(gemm, whole, tiles, {E4M3: _types().kFloat8E4M3, E5M2: _types().kFloat8E5M2})


def _part(name: str) -> Any:
    """Why by name: it is no package that a type checker could find here."""
    return import_module(f"transformer_engine.pytorch.{name}")


def _types() -> Any:
    import_module("transformer_engine.pytorch")  # why: it finds the extension
    return import_module("transformer_engine_torch").DType


def _with_workspace(gemm: Callable[..., Any]) -> Callable[..., Any]:
    """Up to 2.9 the caller brings the workspace."""
    if "workspace" not in inspect.signature(gemm).parameters:
        return gemm
    workspace = _part("module.base").get_workspace
    return lambda a, b, **rest: gemm(a, b, workspace=workspace(), **rest)


def linear(x: Tensor, weight: Tensor, product: Product) -> Tensor:
    """x: (M, K), weight: (N, K) -> (M, N)."""
    rows, missing = x.shape[0], -x.shape[0] % ROWS
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return _Linear.apply(x, weight, product.past, product.seen, How.of(product))[:rows]


class _Linear(torch.autograd.Function):
    """The same as `product._Linear`, in Transformer Engine's layouts: gemm(w, x, "TN") is x·wᵀ."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, past: Tensor, seen: Tensor, how: How
    ) -> Tensor:
        ours = _quantised(x, X, E4M3, past, seen, how)
        theirs = _quantised(weight, W, E4M3, past, seen, how)
        ctx.how, ctx.dtypes = how, (x.dtype, weight.dtype)
        ctx.save_for_backward(ours, weight, past, seen)
        return _product(theirs, ours, x.dtype, "TN", exact=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        kept, weight, past, seen = ctx.saved_tensors
        how: How = ctx.how
        # why: in tiles gradients are e4m3 too, as in the recipe.
        fmt = E4M3 if how.recipe == "block" else E5M2
        ours = _quantised(grads[0].contiguous(), G, fmt, past, seen, how)
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            theirs = _quantised(weight, W, E4M3, past, seen, how)
            to_x = _product(theirs, ours, ctx.dtypes[0], "NN", exact=True)
        if ctx.needs_input_grad[1]:
            to_weight = _product(kept, ours, ctx.dtypes[1], "NT", exact=True)
        return to_x, to_weight, None, None, None


def _product(a: Any, b: Any, dtype: torch.dtype, layout: str, *, exact: bool) -> Tensor:
    out = _engine().gemm(
        a, b, out_dtype=dtype, layout=layout, use_split_accumulator=exact, grad=layout != "TN"
    )
    return out[0]


def _quantised(
    x: Tensor, operand: int, fmt: torch.dtype, past: Tensor, seen: Tensor, how: How
) -> Any:
    """x for products along both of its dims, scaled as `quantise` and `tiles` do."""
    if how.recipe == "block":
        dim = 2 if operand == W else 1
        build = _engine().tiles(
            _engine().dtypes[fmt],
            rowwise=True,
            columnwise=True,
            amax_epsilon=0.0,
            force_pow_2_scales=True,
            block_scaling_dim=dim,
        )
        return build(x)
    now = maximum(x, operand, seen, how, how.axis if operand == W else None)
    return _whole(fmt, _scale(operand, fmt, past, now, how))(x)


def _scale(operand: int, fmt: torch.dtype, past: Tensor, now: Tensor, how: How) -> Tensor:
    amax = now
    if how.recipe == "delayed":
        amax = torch.where(past[operand] > 0, past[operand], now)
    # why: it saturates; what is not finite must be seen by the step's guard.
    return torch.where(now.isfinite(), scale_of(amax, fmt, how.margin), torch.nan)


def _whole(fmt: torch.dtype, scale: Tensor, noted: Tensor | None = None) -> Any:
    """A quantizer; noted: (1,), where its kernel leaves the maximum of what it has cast."""
    noted = torch.zeros(1, device=scale.device) if noted is None else noted
    return _engine().whole(scale.reshape(1), noted, _engine().dtypes[fmt])


def attention(q: Tensor, k: Tensor, v: Tensor, factor: float, product: Product) -> Tensor:
    """cuDNN's FP8 attention. (B, nh, N, 128) -> the same."""
    args = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    out = _Attend.apply(*args, factor, product.past, product.seen, How.of(product))
    return out.transpose(1, 2)


class _Attend(torch.autograd.Function):
    """Operands and formats as in `attention`, whose emulation rounds what this kernel rounds.

    What the kernel itself makes (output, gradient of the logits, gradients) it notes by itself,
    so their first step, without a history, has scale 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        factor: float,
        past: Tensor,
        seen: Tensor,
        how: How,
    ) -> Tensor:
        kernels = _part("cpp_extensions.fused_attn")

        now = maximum(torch.stack([t.abs().amax() for t in (q, k, v)]), INPUTS, seen, how, None)
        inputs = _whole(E4M3, _scale(INPUTS, E4M3, past, now, how))
        q8, k8, v8 = inputs(q), inputs(k), inputs(v)
        batch, tokens = q.shape[:2]
        ends = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
        common = {
            "fake_dtype": q.dtype,
            "fused_attention_backend": kernels.FusedAttnBackend["FP8"],
            "s_quantizer": _whole(E4M3, scale_of(torch.ones((), device=q.device), E4M3)),
            "attn_scale": factor,
            "dropout": 0.0,
            "qkv_layout": "bshd_bshd_bshd",
            "attn_bias_type": "no_bias",
            "attn_mask_type": "no_mask",
        }
        out, aux, *_ = kernels.fused_attn_fwd(
            True,
            tokens,
            tokens,
            ends,
            ends,
            q8,
            k8,
            v8,
            o_quantizer=_noting(OUT, E4M3, past, seen, how),
            **common,
        )
        ctx.common, ctx.how, ctx.aux, ctx.dtype = common, how, list(aux), q.dtype
        ctx.save_for_backward(q8, k8, v8, out, ends, past, seen)
        return out.dequantize(dtype=q.dtype).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        fused_attn_bwd = _part("cpp_extensions.fused_attn").fused_attn_bwd

        q8, k8, v8, out, ends, past, seen = ctx.saved_tensors
        tokens = q8.shape[1]
        grad = _quantised(grads[0].contiguous(), GRADIENT, E5M2, past, seen, ctx.how)
        given = {
            "dqkv_dtype": _types().kFloat8E5M2,
            "aux_ctx_tensors": ctx.aux,
            "dp_quantizer": _noting(LOGITS, E5M2, past, seen, ctx.how),
            "dqkv_quantizer": _noting(TO_INPUTS, E5M2, past, seen, ctx.how),
            **ctx.common,
        }
        known = inspect.signature(fused_attn_bwd).parameters  # newer versions want no dqkv_dtype
        given = {name: value for name, value in given.items() if name in known}
        found = fused_attn_bwd(tokens, tokens, ends, ends, q8, k8, v8, out, grad, **given)
        to = [t.dequantize(dtype=ctx.dtype).view(q8.shape) for t in found[:3]]
        return *to, None, None, None, None


def _noting(operand: int, fmt: torch.dtype, past: Tensor, seen: Tensor, how: How) -> Any:
    """A quantizer of what a kernel makes itself, so that only the kernel knows its maximum."""
    noted = seen[operand : operand + 1] if how.notes else torch.zeros(1, device=seen.device)
    return _whole(fmt, recipes.scale_of(past[operand], fmt, how.margin), noted)
