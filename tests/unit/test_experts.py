"""Grouped matrix products and the token order, against loops in float64."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from parallel.experts import combine, count_picks, dispatch, grouped_mm, order_by_expert

COUNTS = [[3, 0, 5, 2], [0, 0, 10, 0], [10, 0, 0, 0], [0, 0, 0, 0]]


def loop(x: Tensor, w: Tensor, counts: list[int]) -> Tensor:
    pieces = zip(x.split(counts), w, strict=True)
    return torch.cat([piece @ matrix.T for piece, matrix in pieces])


def operands(counts: list[int], k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), k, generator=generator, dtype=torch.float64)
    w = torch.randn(len(counts), n, k, generator=generator, dtype=torch.float64)
    grad = torch.randn(sum(counts), n, generator=generator, dtype=torch.float64)
    return x, w, grad


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("k", "n"), [(8, 16), (5, 7), (12, 3)])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.08)])
def test_values_and_gradients_equal_a_float64_loop(
    counts: list[int], k: int, n: int, dtype: torch.dtype, atol: float
) -> None:
    x, w, grad = (v.to(dtype).double() for v in operands(counts, k, n))
    exact = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    loop(*exact, counts).backward(grad)
    ours = [x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()]
    out = grouped_mm(*ours, torch.tensor(counts))
    out.backward(grad.to(dtype))
    torch.testing.assert_close(out.double(), loop(x, w, counts), atol=atol, rtol=1e-2)
    for got, want in zip(ours, exact, strict=True):
        assert got.grad is not None
        assert got.grad.is_contiguous()
        torch.testing.assert_close(got.grad.double(), want.grad, atol=atol, rtol=1e-2)


def test_operator_is_registered_as_torch_asks() -> None:
    x, w, _ = operands([2, 0, 3, 1], 8, 4)
    args = (x.float().requires_grad_(), w.float().requires_grad_(), torch.tensor([2, 0, 3, 1]))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.dit_pretrain.grouped_mm.default, args, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flops_are_counted_forward_and_backward_on_meta(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        x = torch.empty(10, 8, dtype=dtype, requires_grad=True)
        w = torch.empty(4, 6, 8, dtype=dtype, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            out = grouped_mm(x, w, torch.empty(4, dtype=torch.int64))
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    assert forward.get_total_flops() == 2 * 10 * 6 * 8
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.parametrize("case", ["mixed", "all on one"])
def test_dispatch_and_combine_equal_a_loop_over_tokens(case: str) -> None:
    generator = torch.Generator().manual_seed(2)
    tokens, k, num_experts, width = 7, 2, 5, 4
    picks = torch.rand(tokens, num_experts, generator=generator).topk(k).indices
    if case == "all on one":
        picks = torch.full((tokens, k), 3)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, k, generator=generator, dtype=torch.float64, requires_grad=True)
    gain = torch.arange(1, num_experts + 1, dtype=torch.float64)

    order = order_by_expert(picks, num_experts)
    rows = dispatch(x, order, k)
    names = picks.flatten()[order.forth]
    out = combine(rows * gain[names][:, None], weights, order)
    ours = torch.autograd.grad(out.square().sum(), (x, weights))

    want = torch.stack([(weights[i] * gain[picks[i]]).sum() * x[i] for i in range(tokens)])
    exact = torch.autograd.grad(want.square().sum(), (x, weights))
    assert names.tolist() == sorted(picks.flatten().tolist())
    assert order.counts.tolist() == torch.bincount(picks.flatten(), minlength=num_experts).tolist()
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(ours, exact)


def test_tokens_of_one_expert_keep_their_order() -> None:
    order = order_by_expert(torch.tensor([[1], [0], [1], [0]]), 2)
    assert order.forth.tolist() == [1, 3, 0, 2]
    assert order.back.tolist() == [2, 0, 3, 1]


def test_counts_of_picks_work_on_meta_and_by_image() -> None:
    picks = torch.tensor([[0, 2, 2], [1, 1, 1]])
    assert count_picks(picks, 4).tolist() == [[1, 0, 2, 0], [0, 3, 0, 0]]
    assert count_picks(picks.to("meta"), 4).shape == (2, 4)
