"""torch's scaled products as they are called on a GPU: padding, where scales lie, which are chosen.

Kernels that a CPU lacks are stood in for by ones that check what they are given.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.fp8 import choice
from parallel.fp8.grouped import grouped
from parallel.fp8.linear import linear
from parallel.fp8.product import Product, Switch
from parallel.fp8.recipes import Recipe
from tests.unit.test_fp8 import COUNTS, RECIPES, numbers, product


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_recipe_a: F.ScalingType,
    scale_b: Tensor,
    scale_recipe_b: F.ScalingType,
    output_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """F.scaled_mm, of tiles. a: (M, K) in rows; b: (K, N) in columns."""
    rows, inner = a.shape
    assert a.is_contiguous()
    assert b.t().is_contiguous()
    assert inner % 128 == 0
    assert b.shape[1] % 16 == 0
    assert scale_recipe_a == F.ScalingType.BlockWise1x128
    assert (scale_a.shape, scale_a.stride()) == ((rows, inner // 128), (1, rows))
    left = a.float().view(rows, -1, 128) * scale_a[..., None]
    columns = b.t().float()
    tiles = -(-inner // 128)
    if scale_recipe_b == F.ScalingType.BlockWise128x128:
        wide = -(-tiles // 4) * 4
        assert scale_b.shape == (wide, -(-columns.shape[0] // 128))
        assert scale_b.t().is_contiguous()
        per_row = scale_b.t()[:, :tiles].repeat_interleave(128, 0)[: columns.shape[0]]
    else:
        assert (scale_b.shape, scale_b.stride()) == ((len(columns), tiles), (1, len(columns)))
        per_row = scale_b
    right = columns.view(len(columns), -1, 128) * per_row[..., None]
    return (left.flatten(1) @ right.flatten(1).T).to(output_dtype)


def test_tiles_lie_as_the_kernel_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    results = []
    for backend in ("emulated", "torch"):
        x = numbers(130, 260, seed=1).requires_grad_()
        w = numbers(140, 260, seed=2).requires_grad_()
        out = linear(x, w, None, product("block", backend=backend))
        out.backward(numbers(130, 140, seed=3))
        results.append((out.detach(), x.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def scaled_grouped_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    offs: Tensor,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """torch._scaled_grouped_mm: rows by expert with (E, K, N), or (N, T) with (T, K) by expert."""
    ends = offs.tolist()
    assert offs.dtype == torch.int32
    assert all(end % 16 == 0 for end in ends)
    assert all(scale.is_contiguous() or scale.stride(-1) == 1 for scale in (scale_a, scale_b))
    assert all(n % 16 == 0 for n in (*a.shape[-2:], *b.shape[-2:]))
    assert a.is_contiguous()
    assert b.transpose(-2, -1).is_contiguous()
    starts = [0, *ends[:-1]]
    if b.ndim == 3:
        assert scale_a.shape == (len(a),)
        assert scale_b.shape == (len(ends), b.shape[2])
        out = torch.full((len(a), b.shape[2]), torch.nan)  # what is not written
        for e, (start, end) in enumerate(zip(starts, ends, strict=True)):
            left = a[start:end].float() * scale_a[start:end, None]
            out[start:end] = left @ (b[e].float() * scale_b[e])
        return out.to(out_dtype)
    assert scale_a.shape == (len(ends) * len(a),)
    assert scale_b.shape == (len(ends) * b.shape[1],)
    out = torch.zeros(len(ends), len(a), b.shape[1])
    for e, (start, end) in enumerate(zip(starts, ends, strict=True)):
        left = a[:, start:end].float() * scale_a.view(len(ends), -1)[e, :, None]
        out[e] = left @ (b[start:end].float() * scale_b.view(len(ends), -1)[e])
    return out.to(out_dtype)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_are_padded_and_come_back(
    recipe: Recipe, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)
    results = []
    for backend in ("emulated", "torch"):
        x = numbers(10, 12, seed=1).requires_grad_()
        w = numbers(4, 6, 12, seed=2).requires_grad_()
        out = grouped(x, w, torch.tensor(counts), product(recipe, backend=backend))
        out.backward(numbers(10, 6, seed=3))
        results.append((out.detach(), x.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_products_run_in_fp8_where_that_is_faster() -> None:
    timings = {(4096, 64, 64): (1.0, 1.4), (4096, 4096, 4096): (9.0, 6.0), (8, 8, 8): (1.0, 1.0)}
    assert choice.worthwhile(timings) == {(4096, 4096, 4096)}
    assert choice.able("torch", "block", (512, 128, 256))
    assert not choice.able("torch", "block", (512, 64, 256))
    assert choice.able("torch", "delayed", (5, 7, 9))
    assert choice.able("transformer_engine", "delayed", (5, 48, 32))
    assert not choice.able("transformer_engine", "delayed", (5, 48, 33))


def test_each_shape_is_timed_once_and_the_slow_ones_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def own(*shapes: tuple[int, ...]) -> Product:
        zeros = torch.zeros(3), torch.zeros(3)
        return Product("delayed", 0, "torch", 4, Switch(), *zeros, shapes=set(shapes))

    timed: list[choice.Shape] = []

    def time(_: Product, shape: choice.Shape) -> choice.Seconds:
        timed.append(shape)
        return 1.0, 0.5 if shape[0] > 10 else 2.0

    monkeypatch.setattr(choice, "timed", time)
    held = {"a": own((64, 8, 8)), "b": own((4, 8, 8)), "c": own((64, 8, 8)), "d": own()}
    said: list[str] = []
    assert choice.too_slow(held, said.append) == ["b"]
    assert sorted(timed) == [(4, 8, 8), (64, 8, 8)]
    assert "fp8: 4×8×8: bf16 1000000 µs, fp8 2000000 µs" in said


def test_a_shape_is_timed_forward_and_backward_with_and_without_experts() -> None:
    for shape in ((32, 16, 16), (32, 16, 16, 4)):
        own = product("delayed")
        plain, ours = choice.timed(own, shape, repeats=1)
        assert plain > 0 < ours
        assert not own.seen.any()
