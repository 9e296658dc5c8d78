"""Memory and speed of a unit: what backward recomputes instead of keeping, and compilation.

Both set `unit.forward` on the instance, so names of parameters, hooks and `fully_shard` do not see
them. Routing is kept in every mode: a top-k taken twice can choose differently, and its tokens
would be counted twice. What an engine gathers, it gathers around a unit, or hides from them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import parallel.experts
import parallel.kernels.depthwise
import parallel.kernels.phases  # noqa: F401  (all three register operators)


class RematConfig(BaseModel):
    """What backward recomputes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["none", "full", "selective"] = "none"  # selective keeps products and collectives
    every: PositiveInt = 1  # in every n-th unit, the last of each n


_aten = torch.ops.aten
ROUTING = (_aten.topk.default,)
PRODUCTS = (
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.dit_pretrain.grouped_mm.default,
    _aten._scaled_mm.default,
    _aten._scaled_mm_v2.default,
    _aten._scaled_grouped_mm.default,
    torch.ops.dit_pretrain.mix.default,
    torch.ops.dit_pretrain.phase_attention.default,
)
# Collectives that return a new tensor. Those of `c10d` write into one that they are given: their
# result could be kept, but not what they wrote, so they run again, in the same order on all ranks.
COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd")


def apply(units: Sequence[nn.Module], cfg: RematConfig) -> None:
    """Every n-th unit recomputes in backward. Call it before `compile_units`, and in any order with
    `fully_shard`.
    """
    if cfg.mode == "none":
        return
    keep = partial(_keep, mode=cfg.mode)
    contexts = partial(create_selective_checkpoint_contexts, keep)
    for unit in units[cfg.every - 1 :: cfg.every]:
        # why: the models draw no random numbers in forward, so there is no state to restore.
        unit.forward = partial(  # type: ignore[method-assign]
            checkpoint,
            unit.forward,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=contexts,
        )


def is_kept(operator: Any, mode: str) -> bool:
    """Whether backward finds the results of this operator, instead of running it again."""
    if mode == "selective" and (operator in PRODUCTS or operator.namespace in COLLECTIVES):
        return True
    return operator in ROUTING


def compile_units(
    units: Sequence[nn.Module], *, graphs: int = 8, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compiles each unit; units of one kind share their graphs. Call it after `apply`: what is kept
    is then decided inside the graph, and the top-k stays out of backward's.

    graphs: that one kind may need: one for each input shape (resolution, batch) with gradients, one
    without. More raise FailOnRecompileLimitHit; by default the rest runs uncompiled, in silence.
    """
    config = torch._dynamo.config
    config.recompile_limit = graphs * len({_kind(unit) for unit in units})
    config.fail_on_recompile_limit_hit = True
    # why: sizes that `dispatch.Exact` reads stay unknown in the graph, so one serves every step.
    config.capture_scalar_outputs = True
    for unit in units:
        compiled = torch.compile(unit.forward, dynamic=False, backend=backend)
        unit.forward = compiled  # type: ignore[method-assign]


def _kind(unit: nn.Module) -> tuple[object, ...]:
    """Units of one kind have the same structure and shapes."""
    parts = ((name, type(module)) for name, module in unit.named_modules())
    return (*parts, *((name, p.shape, p.requires_grad) for name, p in unit.named_parameters()))


def _keep(
    _ctx: Any, operator: Callable[..., Any], *_args: Any, mode: str, **_kwargs: Any
) -> CheckpointPolicy:
    kept = is_kept(operator, mode)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
