"""The calls made to Transformer Engine, held against a stand-in that computes them with torch.

It cannot be installed here. The stand-in has the names and arguments of its version 2.4; its
quantised tensors are the values they stand for.
"""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.fp8 import transformer_engine
from parallel.fp8.attention import attend
from parallel.fp8.linear import linear
from parallel.fp8.product import Product, Switch
from parallel.fp8.recipes import E4M3, E5M2, Recipe
from tests.unit.test_fp8 import numbers

LARGEST = {E4M3: 448.0, E5M2: 57344.0}


class Values(torch.Tensor):
    """A quantised tensor as its values; `dequantize` as theirs has it."""

    def dequantize(self, *, dtype: torch.dtype) -> Tensor:
        return self.as_subclass(torch.Tensor).to(dtype)


class Engine:
    """What was called."""

    def __init__(self) -> None:
        self.gemms: list[dict[str, Any]] = []
        self.tiles: list[dict[str, Any]] = []
        self.attention: list[dict[str, Any]] = []

    def quantizer(self, scale: Tensor, amax: Tensor, fp8_dtype: torch.dtype) -> Any:
        """Float8Quantizer: notes the maximum of what it casts."""
        assert scale.shape == amax.shape == (1,)
        assert scale.dtype == amax.dtype == torch.float32

        def cast(x: Tensor) -> Tensor:
            amax.copy_(torch.maximum(amax, x.detach().abs().amax().float()))
            scaled = (x.detach().float() * scale).clamp(-LARGEST[fp8_dtype], LARGEST[fp8_dtype])
            return (scaled.to(fp8_dtype).float() / scale).to(x.dtype).as_subclass(Values)

        return cast

    def tile_quantizer(self, fp8_dtype: torch.dtype, **how: Any) -> Any:
        self.tiles.append({"fp8_dtype": fp8_dtype, **how})
        return lambda x: x.detach().clone().as_subclass(Values)

    def gemm(
        self,
        a: Tensor,
        b: Tensor,
        workspace: str,
        out_dtype: torch.dtype | None = None,
        layout: str = "TN",
        use_split_accumulator: bool = False,
        grad: bool = False,
    ) -> tuple[Tensor, None, None, None]:
        """General gemm, in columns as BLAS has it: rows of the result are those of B."""
        said = {"layout": layout, "exact": use_split_accumulator, "grad": grad}
        self.gemms.append(said | {"workspace": workspace})
        a, b = (t.as_subclass(torch.Tensor) for t in (a, b))
        a, b = (a.T if layout[0] == "T" else a), (b.T if layout[1] == "T" else b)
        return (b @ a).to(out_dtype), None, None, None

    def attend(
        self,
        is_training: bool,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        **rest: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        self.attention.append({"tokens": max_seqlen_q, "ends": cu_seqlens_q.tolist(), **rest})
        q, k, v = (t.as_subclass(torch.Tensor).transpose(1, 2) for t in (q, k, v))
        probs = (q @ k.transpose(-2, -1) * rest["attn_scale"]).softmax(-1)
        out = (rest["s_quantizer"](probs).as_subclass(torch.Tensor) @ v).transpose(1, 2)
        return rest["o_quantizer"](out.contiguous()), [probs]

    def attend_backward(  # of a newer version: no dqkv_dtype
        self,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        d_o: Tensor,
        fake_dtype: torch.dtype,
        aux_ctx_tensors: list[Tensor],
        fused_attention_backend: str,
        s_quantizer: Callable[[Tensor], Tensor],
        dp_quantizer: Callable[[Tensor], Tensor],
        dqkv_quantizer: Callable[[Tensor], Tensor],
        attn_scale: float,
        dropout: float,
        qkv_layout: str,
        attn_bias_type: str,
        attn_mask_type: str,
    ) -> list[Tensor]:
        q, k, v, grad = (t.as_subclass(torch.Tensor).transpose(1, 2) for t in (q, k, v, d_o))
        (probs,) = aux_ctx_tensors
        inner = grad @ v.transpose(-2, -1)
        logits = probs * (inner - (inner * probs).sum(-1, keepdim=True)) * attn_scale
        logits = dp_quantizer(logits).as_subclass(torch.Tensor)
        to_v = s_quantizer(probs).as_subclass(torch.Tensor).transpose(-2, -1) @ grad
        to = (logits @ k, logits.transpose(-2, -1) @ q, to_v)
        return [dqkv_quantizer(t.transpose(1, 2).contiguous()) for t in to]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    engine = Engine()
    types = SimpleNamespace(kFloat8E4M3=E4M3, kFloat8E5M2=E5M2)
    held: dict[str, dict[str, Any]] = {
        "transformer_engine": {},
        "transformer_engine_torch": {"DType": types},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.module": {},
        "transformer_engine.pytorch.module.base": {"get_workspace": lambda: "workspace"},
        "transformer_engine.pytorch.tensor": {},
        "transformer_engine.pytorch.tensor.float8_tensor": {"Float8Quantizer": engine.quantizer},
        "transformer_engine.pytorch.tensor.float8_blockwise_tensor": {
            "Float8BlockQuantizer": engine.tile_quantizer
        },
        "transformer_engine.pytorch.cpp_extensions": {"general_gemm": engine.gemm},
        "transformer_engine.pytorch.cpp_extensions.fused_attn": {
            "FusedAttnBackend": {"FP8": "FP8"},
            "fused_attn_fwd": engine.attend,
            "fused_attn_bwd": engine.attend_backward,
        },
    }
    for name, contents in held.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    transformer_engine._engine.cache_clear()
    yield engine
    transformer_engine._engine.cache_clear()


def product(recipe: Recipe, backend: Any, operands: int = 3) -> Product:
    past = torch.tensor([0.5, 0.0, 2.0, 0.0, 0.0][:operands])
    return Product(recipe, 0, backend, 4, Switch(), past, torch.zeros(operands))


def passed(own: Product) -> list[Tensor]:
    x = numbers(20, 32, seed=1).requires_grad_()  # rows that are no multiple of 16
    weight = numbers(48, 32, seed=2).requires_grad_()
    out = linear(x, weight, None, own)
    out.backward(numbers(20, 48, seed=3))
    assert x.grad is not None
    assert weight.grad is not None
    return [out.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_its_linear_is_ours_with_the_same_scales(recipe: Recipe, engine: Engine) -> None:
    theirs, ours = product(recipe, "transformer_engine"), product(recipe, "emulated")
    for one, other in zip(passed(theirs), passed(ours), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(theirs.seen, ours.seen)
    assert [call["layout"] for call in engine.gemms] == ["TN", "NN", "NT"]
    assert [call["exact"] for call in engine.gemms] == [False, True, True]
    assert {call["workspace"] for call in engine.gemms} == {"workspace"}


def test_its_tiles_are_those_of_the_recipe(engine: Engine) -> None:
    passed(product("block", "transformer_engine"))
    assert [call["block_scaling_dim"] for call in engine.tiles] == [1, 2, 1, 2]
    assert {call["fp8_dtype"] for call in engine.tiles} == {E4M3}
    assert all(c["force_pow_2_scales"] and c["rowwise"] and c["columnwise"] for c in engine.tiles)


def test_what_is_not_finite_is_not_hidden_by_its_saturation(engine: Engine) -> None:
    x = torch.ones(16, 16)
    x[0, 0] = torch.inf
    out = linear(x.requires_grad_(), torch.ones(16, 16), None, product("delayed", "emulated"))
    theirs = product("delayed", "transformer_engine")
    assert not linear(x, torch.ones(16, 16), None, theirs).isfinite().any()
    assert not out.isfinite().any()


def test_its_attention_is_our_emulation(engine: Engine) -> None:
    results, seen = [], []
    for backend in ("emulated", "transformer_engine"):
        own = product("delayed", backend, 5)
        own.past.fill_(8.0)
        draws = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 3, 8, 16, generator=draws).requires_grad_() for _ in range(3))
        out = attend(q, k, v, 0.3, own)
        out.backward(torch.randn(out.shape, generator=draws))
        results.append((out.detach(), q.grad, k.grad, v.grad))
        seen.append(own.seen)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(*seen, rtol=1e-3, atol=1e-3)
    (call,) = engine.attention
    assert (call["tokens"], call["ends"]) == (8, [0, 8, 16])
    assert (call["attn_mask_type"], call["qkv_layout"]) == ("no_mask", "bshd_bshd_bshd")
    assert call["fused_attention_backend"] == "FP8"


def test_it_is_not_needed_at_import_time() -> None:
    assert "transformer_engine" not in sys.modules
