"""FP8 products: scales, roundings, gradients, against references written out by hand."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.fp8 import recipes
from parallel.fp8.attention import attend
from parallel.fp8.grouped import grouped
from parallel.fp8.linear import linear
from parallel.fp8.multiply import _Spread
from parallel.fp8.product import Product, Switch
from parallel.fp8.recipes import E4M3, E5M2, FP8Config, Recipe
from parallel.fp8.scaling import Scaling, attach, products
from parallel.mesh import ALONE
from pretrain.models.build import build
from tests.unit.test_remat import make

RECIPES: tuple[Recipe, ...] = ("delayed", "current", "block")
LIMITS = {E4M3: 448.0, E5M2: 57344.0}


@pytest.fixture(autouse=True)
def _graphs() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


def product(recipe: Recipe, operands: int = 3, backend: Any = "emulated", **more: Any) -> Product:
    zeros = torch.zeros(operands), torch.zeros(operands)
    return Product(recipe, 0, backend, 4, Switch(), *zeros, **more)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    # why: over many powers of two, so that some fall below the smallest normal number.
    power = torch.randint(-12, 4, shape, generator=draws).float().exp2()
    return torch.randn(*shape, generator=draws) * power


def nearest(values: Tensor, fmt: torch.dtype) -> Tensor:
    """The representable numbers nearest to values, even code on a tie: by looking at all."""
    table = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(fmt).double()
    wanted = values.double().flatten().clamp(-LIMITS[fmt], LIMITS[fmt])
    far = (table - wanted[:, None]).abs()  # (n, 256)
    far = torch.where(table.isfinite(), far, math.inf)
    odd = torch.arange(256) % 2
    best = torch.where(far == far.amin(1, keepdim=True), 2 - odd, 0).argmax(1)
    return table[best].view(values.shape)


def power_below(amax: float, fmt: torch.dtype) -> float:
    """2^k with amax·2^k at most the largest number of the format, k as large as can be."""
    if amax == 0:
        return 1.0
    k = -200
    while amax * 2.0 ** (k + 1) <= LIMITS[fmt]:
        k += 1
    return 2.0**k


def rounded(x: Tensor, fmt: torch.dtype, amax: float | None = None) -> Tensor:
    """What one scale makes of x, value by value, in float64."""
    scale = power_below(float(x.abs().max()) if amax is None else amax, fmt)
    return nearest(x.double() * scale, fmt) / scale


def by_tiles(x: Tensor, height: int, width: int) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float64)
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            place = (slice(i, i + height), slice(j, j + width))
            out[place] = rounded(x[place], E4M3)
    return out


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
@pytest.mark.parametrize("amax", [1.0, 448.0, 449.0, 0.07, 3e-9, 2e20])
def test_a_scale_is_the_largest_power_of_two_that_fits(fmt: torch.dtype, amax: float) -> None:
    scale = float(recipes.scale_of(torch.tensor(amax), fmt))
    assert scale == power_below(float(torch.tensor(amax)), fmt)
    assert float(recipes.scale_of(torch.tensor(amax), fmt, margin=3)) == scale / 8


def test_nothing_and_infinity_have_scales_that_harm_nobody() -> None:
    assert float(recipes.scale_of(torch.tensor(0.0), E4M3)) == 1.0
    zeros = recipes.whole(torch.zeros(3, 4), E4M3, torch.zeros(()))
    assert torch.equal(zeros.plain(torch.float32), torch.zeros(3, 4))
    assert float(recipes.largest(torch.zeros(0, 4))) == 0.0
    tiny = torch.full((2, 2), 1e-38)
    assert recipes.whole(tiny, E5M2, recipes.largest(tiny)).plain(torch.float32).isfinite().all()


@pytest.mark.parametrize("fmt", [E4M3, E5M2])
def test_values_round_to_the_nearest_and_are_exact_in_bfloat16(fmt: torch.dtype) -> None:
    x = numbers(16, 24)
    held = recipes.whole(x, fmt, recipes.largest(x))
    assert torch.equal(held.plain(torch.float64), rounded(x, fmt))
    assert torch.equal(held.plain(torch.bfloat16).double(), held.plain(torch.float64))


def test_a_history_that_is_too_small_saturates() -> None:
    x = torch.tensor([[0.5, 3.0, -70.0, 1.1]])
    held = recipes.by_history(x, E4M3, torch.tensor(1.0), recipes.largest(x))
    # scale 256: 448/256 = 1.75 is the largest that is left
    assert held.plain(torch.float64).tolist() == [[0.5, 1.75, -1.75, 1.125]]
    first = recipes.by_history(x, E4M3, torch.tensor(0.0), recipes.largest(x))
    assert torch.equal(first.plain(torch.float64), rounded(x, E4M3))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_finite_is_not_hidden(recipe: Recipe, bad: float) -> None:
    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    x[3, 2] = bad
    own = product(recipe)
    own.past.fill_(4.0)
    x.requires_grad_()
    assert not linear(x, weight, None, own)[3].isfinite().any()


def test_tiles_at_ragged_edges_have_scales_of_their_own() -> None:
    x = numbers(130, 260)
    for tile in ((1, 128), (128, 128)):
        held = recipes.tiles(x, E4M3, tile)
        assert held.inverse.shape == (-(-130 // tile[0]), 3)
        assert torch.equal(held.plain(torch.float64)[:130, :260], by_tiles(x, *tile))


def reference(x: Tensor, w: Tensor, grad: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """Output and gradients of a linear, roundings written out, float64."""
    if recipe == "block":
        out = by_tiles(x, 1, 128) @ by_tiles(w, 128, 128).T
        to_x = by_tiles(grad, 1, 128) @ by_tiles(w, 128, 128)
        to_w = by_tiles(grad.T, 1, 128) @ by_tiles(x.T, 1, 128).T
        return out, to_x, to_w
    x8, w8, g8 = rounded(x, E4M3), rounded(w, E4M3), rounded(grad, E5M2)
    return x8 @ w8.T, g8 @ w8, g8.T @ x8


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_linear_is_the_product_of_rounded_values(recipe: Recipe) -> None:
    x, w, grad = numbers(40, 136, seed=1), numbers(20, 136, seed=2), numbers(40, 20, seed=3)
    bias = numbers(20)
    ours = [x.clone().requires_grad_(), w.clone().requires_grad_(), bias.clone().requires_grad_()]
    own = product(recipe)
    out = linear(ours[0].view(2, 20, 136), ours[1], ours[2], own)
    assert out.shape == (2, 20, 20)
    out.backward(grad.view(2, 20, 20))
    want = reference(x, w, grad, recipe)
    got = ((out.detach() - bias).view(40, 20), ours[0].grad, ours[1].grad)
    for one, other in zip(got, want, strict=True):
        assert one is not None
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-5 * other.abs().max())
    torch.testing.assert_close(ours[2].grad, grad.sum(0))
    seen = [float(t.abs().max()) for t in (x, w, grad)] if recipe == "delayed" else [0.0] * 3
    assert own.seen.tolist() == seen


def test_delayed_scales_are_those_of_the_past() -> None:
    x, w = numbers(8, 16, seed=1), numbers(4, 16, seed=2)
    own = product("delayed")
    own.past.copy_(torch.tensor([0.1, 100.0, 1.0]))
    x.requires_grad_()
    out = linear(x, w, None, own)
    want = rounded(x.detach(), E4M3, 0.1) @ rounded(w, E4M3, 100.0).T
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(33, 40, 24), (16, 16, 16), (7, 19, 5)])
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_torchs_scaled_product_gives_what_the_emulation_gives(
    recipe: Recipe, sizes: tuple[int, int, int]
) -> None:
    rows, inner, outer = sizes
    results = []
    for backend in ("emulated", "torch"):
        x = numbers(rows, inner, seed=1).bfloat16().requires_grad_()
        w = numbers(outer, inner, seed=2).bfloat16().requires_grad_()
        out = linear(x, w, None, product(recipe, backend=backend))
        out.backward(numbers(rows, outer, seed=3).bfloat16())
        results.append((out.detach(), x.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


COUNTS = [[3, 0, 5, 2], [0, 0, 10, 0], [4, 1, 0, 2, 3]]  # the last: three rows are nobody's


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_are_products_of_rounded_values(recipe: Recipe, counts: list[int]) -> None:
    x, w, grad = numbers(10, 12, seed=1), numbers(4, 6, 12, seed=2), numbers(10, 6, seed=3)
    real = sum(counts[:4])
    ours = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    out = grouped(*ours, torch.tensor(counts), product(recipe))
    out.backward(grad)
    if recipe == "block":  # a scale a row of what is summed over

        def each(t: Tensor) -> Tensor:
            return torch.stack([rounded(row, E4M3) for row in t])

        x8, w8 = each(x), torch.stack([each(one) for one in w])
        g8, w8_t = each(grad), torch.stack([each(one.T) for one in w]).transpose(1, 2)
        x8_t, g8_t = each(x.T).T, each(grad.T).T
    else:
        x8 = x8_t = rounded(x, E4M3)
        g8 = g8_t = rounded(grad, E5M2)
        one_each = torch.stack([rounded(one, E4M3) for one in w])
        w8 = w8_t = one_each if recipe == "current" else rounded(w, E4M3)
    expert = torch.repeat_interleave(torch.arange(4), torch.tensor(counts[:4]))
    want = torch.zeros(10, 6, dtype=torch.float64)
    to_x, to_w = torch.zeros(10, 12).double(), torch.zeros(4, 6, 12).double()
    for row, e in enumerate(expert[:real].tolist()):
        want[row], to_x[row] = w8[e] @ x8[row], g8[row] @ w8_t[e]
        to_w[e] += torch.outer(g8_t[row], x8_t[row])
    for got, other in zip(
        (out.detach(), ours[0].grad, ours[1].grad), (want, to_x, to_w), strict=True
    ):
        assert got is not None
        torch.testing.assert_close(got.double(), other, rtol=1e-5, atol=2e-5 * other.abs().max())


@pytest.mark.parametrize("counts", COUNTS)
def test_rows_of_an_expert_begin_at_sixteens(counts: list[int]) -> None:
    spread = _Spread.of(torch.tensor(counts), 4, 10)
    x = torch.arange(1.0, 21.0).view(10, 2)
    wide, real = spread.forth(x), sum(counts[:4])
    begin = 0
    for expert, end in enumerate(spread.ends.tolist()):
        own = x[sum(counts[:expert]) : sum(counts[: expert + 1])]
        assert begin % 16 == 0
        assert torch.equal(wide[begin : begin + len(own)], own)
        assert not wide[begin + len(own) : end].any()
        begin = end
    wide[begin:] = math.nan  # as a kernel may leave them
    back = spread.back(wide)
    assert torch.equal(back[:real], x[:real])
    assert not back[real:].any()


def test_attention_rounds_and_stays_near() -> None:
    shape = (2, 2, 16, 8)
    results = []
    for own in (None, product("delayed", 5)):
        draws = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(shape, generator=draws).requires_grad_() for _ in range(3))
        out = attend(q, k, v, None, own)
        out.backward(torch.randn(shape, generator=draws))
        results.append((out, q.grad, k.grad, v.grad))
    assert own is not None
    for plain, ours in zip(*results, strict=True):
        assert plain is not None
        error = (ours - plain).norm() / plain.norm()
        assert 1e-3 < error < 0.15
    assert (own.seen > 0).all()


def fp8_model(name: str = "udit-moe", **changes: Any) -> nn.Module:
    model = make(name)
    model.dtype = torch.bfloat16
    cfg = FP8Config(**({"keep_first": 1, "keep_last": 1} | changes))
    attach(model.units(), cfg, "emulated", ALONE, torch.device("cpu"))
    return model


def outputs(model: nn.Module) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, 16, 8, 8, generator=draws), torch.rand(4, generator=draws) * 1000
    return model(x, t, torch.arange(4))


def test_blocks_but_the_first_and_last_run_in_fp8_and_nothing_else_does() -> None:
    found = products(fp8_model())
    assert {name.split(".")[0] for name in found} == {"enc2", "latent", "dec2"}
    kinds = {name.split(".", 4)[-1] for name in found}
    core = {f"core.{leaf}" for leaf in ("q", "k", "v", "out")}
    assert core <= {name.removeprefix("attn.") for name in kinds}
    assert not [n for n in found if "adaln" in n or "router" in n or "mix" in n or "condition" in n]
    assert [n for n in found if n.endswith("experts.gate")]
    everything = products(fp8_model(keep_first=0, keep_last=0, attention=True))
    assert {name.split(".")[0] for name in everything} == {"enc1", "enc2", "latent", "dec2", "dec1"}
    assert len([n for n in everything if n.endswith(".attention")]) == 10


def test_what_is_only_looked_at_is_not_in_fp8() -> None:
    model, plain = fp8_model(), make("udit-moe")
    plain.dtype = torch.bfloat16
    with torch.no_grad():
        assert torch.equal(outputs(model), outputs(plain))
    assert not torch.equal(outputs(model), outputs(plain))
    assert all(own.seen[0] > 0 for own in products(model).values())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    outputs(model).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_compiled_product_has_the_same_bits_and_notes_the_same(recipe: Recipe) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(numbers(24, 40).bfloat16())
            self.experts = nn.Parameter(numbers(2, 8, 24).bfloat16())
            self.own, self.other = product(recipe), product(recipe)

        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(linear(x, self.weight, None, self.own))
            return grouped(x, self.experts, torch.tensor([4, 6]), self.other)

    results = []
    for compiled in (False, True):
        two = Two()
        run = torch.compile(two, backend="aot_eager", fullgraph=True) if compiled else two
        out = run(numbers(10, 40).bfloat16().requires_grad_())
        out.sum().backward()
        results.append((out, two.weight.grad, two.experts.grad, two.own.seen, two.other.seen))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_histories_take_in_the_largest_of_a_step_and_forget() -> None:
    model = fp8_model(history=3)
    scaling = Scaling(model, torch.device("cpu"))
    name = "latent.blocks.0.first.attn.core.q"
    own, rows = scaling.products[name], len(scaling.maxima())
    history = scaling.tensors()[f"fp8.{name}.history"]
    for step, (value, skip) in enumerate([(2.0, 0), (8.0, 0), (4.0, 1), (math.inf, 0), (1.0, 0)]):
        own.seen.fill_(value)
        scaling.advance(scaling.maxima(), torch.tensor(bool(skip)))
        assert not own.seen.any(), step
        want = [[2], [8, 2], [8, 2], [0, 8, 2], [1, 0, 8]][step]
        assert history[1].tolist() == (want + [0, 0])[:3]
        assert own.past.tolist() == [max(want)] * 3
    assert len(scaling.maxima()) == rows
    scaling.turn_off([name])
    held = scaling.scalars()
    scaling.restart()
    assert not history.any()
    assert scaling.off == []
    scaling.take(held)
    assert scaling.off == [name]


def test_what_a_checkpoint_does_not_hold_starts_fresh() -> None:
    scaling = Scaling(fp8_model(history=3), torch.device("cpu"))
    for tensor in scaling.tensors().values():
        tensor.fill_(1.0)
    first, second, *rest = scaling.tensors()
    stored = {name: (3, 3) for name in (second, *rest)} | {second: (3, 9)}
    assert scaling.absent(stored) == {first, second}
    assert not scaling.tensors()[first].any()
    assert all(scaling.tensors()[name].all() for name in rest)
    empty = Scaling(build(make("dit").cfg), torch.device("cpu"))
    assert (empty.tensors(), empty.metrics(), len(empty.maxima())) == ({}, {}, 0)
