"""Grouped matrix products and the token order, against loops in float64."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from parallel.experts import Picks, combine, count_picks, grouped_mm, order_by_expert, spread, take

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_nobody_are_not_read_and_give_zeros(dtype: torch.dtype) -> None:
    counts = [3, 0, 5]
    x, w, grad = (v.to(dtype) for v in operands([*counts, 4], 5, 7))
    x[8:], grad[8:] = float("nan"), float("inf")
    x.requires_grad_()
    w = w[:3].clone().requires_grad_()
    out = grouped_mm(x, w, torch.tensor([*counts, 4]))
    out.backward(grad)
    plain = [x[:8].detach().requires_grad_(), w.detach().requires_grad_()]
    want = grouped_mm(*plain, torch.tensor(counts))
    want.backward(grad[:8])
    assert out[8:].eq(0).all()
    assert x.grad[8:].eq(0).all()
    torch.testing.assert_close(out[:8], want)
    torch.testing.assert_close(x.grad[:8], plain[0].grad)
    torch.testing.assert_close(w.grad, plain[1].grad)


PICKS = {
    "mixed": [[4, 1], [0, 2], [2, 1], [3, 0], [1, 4], [2, 3], [0, 1]],
    "all on one": [[3, 3]] * 7,
    "varied": [[], [1], [0, 1, 2, 3, 4], [2, 4], [], [0, 1, 4], []],
}


@pytest.mark.parametrize("case", PICKS)
def test_spread_and_combine_equal_a_loop_over_tokens(case: str) -> None:
    generator = torch.Generator().manual_seed(2)
    chosen, num_experts, width = PICKS[case], 5, 4
    experts = torch.tensor([e for row in chosen for e in row])
    tokens = torch.tensor([t for t, row in enumerate(chosen) for _ in row])
    lengths = torch.tensor([len(row) for row in chosen]) if case == "varied" else 2
    x = torch.randn(7, width, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(len(experts), generator=generator, dtype=torch.float64, requires_grad=True)
    gain = torch.arange(1, num_experts + 1, dtype=torch.float64)

    picks = Picks(experts, weights, tokens, lengths)
    order = order_by_expert(experts, num_experts)
    names = experts[order.forth]
    out = combine(spread(x, picks, order) * gain[names][:, None], picks, order)
    ours = torch.autograd.grad(out.square().sum(), (x, weights))

    scale = torch.zeros(7, dtype=torch.float64)
    for pick, (token, expert) in enumerate(zip(tokens, experts, strict=True)):
        scale = scale + torch.eye(7, dtype=torch.float64)[token] * weights[pick] * gain[expert]
    want = scale[:, None] * x
    exact = torch.autograd.grad(want.square().sum(), (x, weights))
    assert names.tolist() == sorted(experts.tolist())
    assert order.counts.tolist() == torch.bincount(experts, minlength=num_experts).tolist()
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(ours, exact)


def test_take_gathers_back_and_leaves_zero_where_nothing_was_taken() -> None:
    rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    index, inverse = torch.tensor([2, 0, 3]), torch.tensor([1, 0, 0, 2])
    taken = torch.tensor([True, False, True, True])
    out = take(rows, index, inverse, taken)
    (got,) = torch.autograd.grad(out.square().sum(), rows)
    assert torch.equal(out, rows[index])
    torch.testing.assert_close(got, 2 * rows.detach() * taken[:, None])


def test_tokens_of_one_expert_keep_their_order() -> None:
    order = order_by_expert(torch.tensor([[1], [0], [1], [0]]), 2)
    assert order.forth.tolist() == [1, 3, 0, 2]
    assert order.back.tolist() == [2, 0, 3, 1]


def test_counts_of_picks_work_on_meta_and_by_image() -> None:
    picks = torch.tensor([[0, 2, 2], [1, 1, 1]])
    assert count_picks(picks, 4).tolist() == [[1, 0, 2, 0], [0, 3, 0, 0]]
    assert count_picks(picks.to("meta"), 4).shape == (2, 4)
