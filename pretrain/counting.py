"""What a forward of one image costs: the operators a model on meta calls, and what autograd keeps.

MACs are those of the operators (attention included), activations those autograd keeps; both by
transformer block, so that a plan can add them up for any layout. Attention counts as its flash
kernel, which keeps no scores.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from parallel.precision import COMPUTE, Precision
from parallel.remat import is_kept
from pretrain.models.build import Model, ModelConfig, build_form
from pretrain.models.layers import Block
from pretrain.models.rep import Form


@dataclass
class Count:
    """One run of a block, or of everything around the blocks."""

    macs: int = 0
    saved: int = 0  # bytes autograd keeps
    kept: dict[str, int] = field(default_factory=dict)  # by mode of remat, bytes never recomputed
    entering: int = 0  # bytes of the tokens that come in
    tokens: int = 0
    width: int = 0


@dataclass
class Cost:
    """Of one image."""

    blocks: dict[str, Count] = field(default_factory=dict)  # by name of the block, in order
    rest: Count = field(default_factory=Count)

    @property
    def macs(self) -> int:
        return self.rest.macs + sum(block.macs for block in self.blocks.values())


@lru_cache(maxsize=8)
def counted(form: Form, cfg: ModelConfig, precision: Precision) -> tuple[Model, Cost]:
    """A model on meta, and what a forward of one image costs."""
    with torch.device("meta"):
        model = build_form(cfg, form)
        model.dtype = COMPUTE[precision]
        model.to(model.dtype)
        for router in model.routers():
            router.float()
        fixed = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        cost, kinds = Cost(), {}
        names = {id(module): name for name, module in model.named_modules()}
        for block in (m for m in model.modules() if isinstance(m, Block)):
            entry = cost.blocks.setdefault(names[id(block)], Count())
            _count_block(block, entry, kinds, fixed)
        x_t = torch.empty(1, cfg.in_channels, cfg.input_size, cfg.input_size)
        label = torch.zeros(1, dtype=torch.int64)
        saved = _Saved(fixed)
        with _Flash(), FlopCounterMode(display=False) as flops, saved.counting():
            model(x_t, torch.empty(1), label)
    ran_inside = sum(entry.macs for entry, _ in kinds.values())
    cost.rest = Count(flops.get_total_flops() // 2 - ran_inside, saved.bytes)
    return model, cost


def _count_block(block: nn.Module, entry: Count, kinds: dict[Any, Any], fixed: set[int]) -> None:
    """Make a block count itself when called; equal blocks are run once and looked up after."""
    run = block.forward
    shape = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())

    def forward(x: Tensor, *args: Any) -> Any:
        kind = (shape, tuple(x.shape))
        if kind not in kinds:
            saved, kept = _Saved(fixed), _Kept()
            with FlopCounterMode(display=False) as flops, saved.counting(), kept:
                out = run(x, *args)
            macs = flops.get_total_flops() // 2
            tokens, width = math.prod(x.shape[1:-1]), x.shape[-1]
            entering = x.untyped_storage().nbytes()
            done = Count(macs, saved.bytes, kept.bytes, entering, tokens, width)
            kinds[kind] = (done, out)
        done, out = kinds[kind]
        vars(entry).update(vars(done))
        return out

    block.forward = forward  # type: ignore[method-assign]


class _Flash(TorchFunctionMode):
    """Attention on meta as the flash kernel. Why: meta chooses the form that keeps all scores."""

    def __torch_function__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(*args, 0.0, False, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


class _Kept(TorchDispatchMode):
    """Bytes that each mode of remat keeps of what operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"full": 0, "selective": 0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for mode in self.bytes:
            if is_kept(func, mode):
                parts = out if isinstance(out, tuple | list) else (out,)
                tensors = [part for part in parts if isinstance(part, Tensor)]
                self.bytes[mode] += sum(t.untyped_storage().nbytes() for t in tensors)
        return out


class _Saved:
    """Bytes that autograd keeps, each storage once, weights and tables not."""

    def __init__(self, fixed: set[int]) -> None:
        self._fixed = fixed
        self._kept: dict[int, Tensor] = {}

    def counting(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._fixed:
            # why: kept alive, so that no later storage gets the same number.
            self._kept[_storage(tensor)] = tensor
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
