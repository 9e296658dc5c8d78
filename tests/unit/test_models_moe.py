"""The mixture-of-experts layer against a dense loop over tokens and experts."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.balance import auxiliary_loss
from pretrain.models.dit import PUBLISHED_MOE
from pretrain.models.init import initialise
from pretrain.models.layers import SwiGLU
from pretrain.models.moe import MoE, MoEConfig, Router, Routing

WIDTH = 8
OURS = MoEConfig(experts=5, top_k=2, hidden=12, scale=1.5)
PUBLISHED = MoEConfig(**{**PUBLISHED_MOE, "experts": 5, "hidden_ratio": 1.5})
CHOOSING = MoEConfig(experts=5, top_k=2, hidden=12, scale=1.5, balance="expert_choice")
RAW = CHOOSING.model_copy(update={"renormalise": False, "score": "softmax"})


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


class Recorded(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def layer(cfg: MoEConfig, *, shared: bool = True) -> MoE:
    moe = MoE(WIDTH, cfg, SwiGLU(WIDTH, 6) if shared else None)
    initialise(moe, 0, zero_std=0.5)
    return moe.double()


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    draw = torch.randn(3, 3, 2, 3, WIDTH, generator=generator, dtype=torch.float64)
    return draw[0], draw[1], draw[2, :, 0, 0]


def chosen_by_tokens(moe: MoE, score: Tensor) -> list[list[int]]:
    """The experts of each token of an image. score: (N, E)."""
    return [(row + moe.router.bias).topk(moe.cfg.top_k).indices.tolist() for row in score]


def chosen_by_experts(moe: MoE, score: Tensor) -> list[list[int]]:
    each = -(-len(score) * moe.cfg.top_k // moe.cfg.experts)
    best = [column.sort(descending=True).indices[:each].tolist() for column in score.T]
    return [[e for e, taken in enumerate(best) if n in taken] for n in range(len(score))]


def dense(moe: MoE, x: Tensor, normed: Tensor, time: Tensor) -> Tensor:
    """Every token through every expert of its own, one at a time, in float64."""
    cfg, router, experts = moe.cfg, moe.router, moe.experts
    by_experts = cfg.balance == "expert_choice"
    out = []
    for b in range(x.shape[0]):
        image = x[b].reshape(-1, WIDTH)
        read = image if cfg.router_input == "modulated" else normed[b].reshape(-1, WIDTH)
        logits = read @ router.weight.T
        if cfg.router_time:
            shift = router.time @ time[b]
            logits = logits * (1 + shift) if by_experts else logits + shift
        score = logits.softmax(-1) if cfg.score == "softmax" else logits.sigmoid()
        choose = chosen_by_experts if by_experts else chosen_by_tokens
        for token, row, chosen in zip(image, score, choose(moe, score), strict=True):
            weights = row[chosen]
            if cfg.renormalise:
                weights = weights / weights.sum()
            y = torch.zeros(WIDTH, dtype=x.dtype)
            for e, weight in zip(chosen, weights * cfg.scale, strict=True):
                hidden = F.silu(experts.gate[e] @ token) * (experts.up[e] @ token)
                y = y + weight * (experts.down[e] @ hidden)
            out.append(y if moe.shared is None else y + moe.shared(token))
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize(
    ("cfg", "case"),
    [
        (OURS, "mixed"),
        (OURS, "all on two"),
        (PUBLISHED, "mixed"),
        (PUBLISHED, "all on two"),
        (CHOOSING, "mixed"),
        (RAW, "mixed"),
    ],
)
def test_values_and_gradients_equal_a_dense_loop(cfg: MoEConfig, case: str) -> None:
    moe = layer(cfg)
    if case == "all on two":
        moe.router.bias[1:3] += 100
    args = tokens()
    # why: the grouped product knows no float64, so ours runs in float32 beside the exact loop.
    single, exact = copy.deepcopy(moe).float(), moe
    out, routing = single(*(value.float() for value in args))
    want = dense(exact, *args)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    out.square().sum().backward()
    want.square().sum().backward()
    for (name, got), ref in zip(single.named_parameters(), exact.parameters(), strict=True):
        assert got.grad is not None, name
        wanted = torch.zeros_like(ref) if ref.grad is None else ref.grad
        torch.testing.assert_close(got.grad.double(), wanted, atol=2e-5, rtol=1e-4)
    assert routing.dropped == 0
    if cfg.balance == "expert_choice":
        assert routing.counts.tolist() == [[3.0] * 5] * 3  # ceil(6 tokens · 2 / 5)
    else:
        assert routing.counts.sum(-1).tolist() == [12.0] * 3
    if case == "all on two":
        assert routing.counts.tolist() == [[0, 6, 6, 0, 0]] * 3
        assert single.experts.gate.grad[[0, 3, 4]].eq(0).all()


def test_routing_is_the_same_in_training_and_evaluation() -> None:
    moe = layer(OURS).float()
    args = [value.float() for value in tokens()]
    out, routing = moe.train()(*args)
    out_eval, routing_eval = moe.eval()(*args)
    assert torch.equal(out, out_eval)
    assert torch.equal(routing.counts, routing_eval.counts)


def test_bias_chooses_and_does_not_weigh() -> None:
    router = Router(WIDTH, OURS)
    initialise(router, 0)
    x, time = torch.randn(2, 4, WIDTH), torch.randn(2, WIDTH)
    router.bias[3] += 10
    picks, routing = router(x, time)
    experts = picks.experts.view(2, 4, 2)
    assert experts[..., 0].eq(3).all()
    score = F.linear(x, router.weight).sigmoid()
    picked = score.gather(-1, experts)
    torch.testing.assert_close(
        picks.weights.view(2, 4, 2), OURS.scale * picked / picked.sum(-1, keepdim=True)
    )
    assert routing.counts.requires_grad is False
    assert routing.counts[:, 3].tolist() == [4.0, 4.0]


def test_routing_reports_sums_over_the_tokens_of_an_image() -> None:
    router = Router(WIDTH, PUBLISHED)
    initialise(router, 0)
    x = torch.randn(2, 4, WIDTH)
    picks, routing = router(x, torch.zeros(2, WIDTH))
    logits = F.linear(x, router.weight)
    torch.testing.assert_close(routing.probs, logits.softmax(-1).sum(1))
    torch.testing.assert_close(routing.z, logits.logsumexp(-1).square().sum(1))
    second = picks.experts.view(2, -1)[1]
    assert routing.counts[1].tolist() == torch.bincount(second, minlength=5).tolist()


@pytest.mark.parametrize(("scale", "low", "high"), [(0.0, 1.0, 1.0), (1.0, 0.95, 1.3)])
def test_published_auxiliary_loss_is_alpha_at_a_zero_router(
    scale: float, low: float, high: float
) -> None:
    router = Router(WIDTH, PUBLISHED)
    initialise(router, 0)
    with torch.no_grad():
        router.weight.mul_(scale)
    _, routing = router(torch.randn(4, 64, WIDTH), torch.zeros(4, WIDTH))
    share = routing.counts.sum(0) / routing.counts.sum()
    score = routing.probs.sum(0) / (4 * 64)
    loss = PUBLISHED.aux_batch * PUBLISHED.experts * (share * score).sum()
    assert PUBLISHED.aux_batch * low - 1e-8 <= loss.item() <= PUBLISHED.aux_batch * high + 1e-8


def test_router_starts_as_published_and_its_time_term_at_zero() -> None:
    router = Router(64, MoEConfig(experts=16))
    initialise(router, 0)
    assert 0.12 < router.weight.abs().max() <= 64**-0.5
    assert router.time.eq(0).all()
    assert router.bias.eq(0).all()
    assert router.bias.dtype == torch.float32


def test_picks_stand_in_order_of_token_and_name_it() -> None:
    for cfg in (OURS, CHOOSING):
        router = Router(WIDTH, cfg)
        initialise(router, 0)
        picks, _ = router(torch.randn(3, 7, WIDTH), torch.zeros(3, WIDTH))
        lengths = picks.lengths
        lengths = torch.full((21,), lengths) if isinstance(lengths, int) else lengths
        assert picks.tokens.tolist() == torch.arange(21).repeat_interleave(lengths).tolist()
        assert len(picks.experts) == len(picks.weights) == lengths.sum()


def test_time_changes_which_tokens_an_expert_chooses() -> None:
    router = Router(WIDTH, RAW)
    initialise(router, 0)
    x, time = torch.randn(1, 64, WIDTH), torch.randn(1, WIDTH)
    before, _ = router(x, time)
    with torch.no_grad():
        router.time.normal_()
    after, _ = router(x, time)
    assert before.tokens.tolist() != after.tokens.tolist()


@pytest.mark.parametrize("cfg", [OURS, CHOOSING])
def test_a_choice_comes_from_one_top_k(cfg: MoEConfig) -> None:
    # remat saves the outputs of this operator, so that nothing is chosen twice
    router = Router(WIDTH, cfg)
    initialise(router, 0)
    with Recorded() as seen:
        router(torch.randn(2, 9, WIDTH), torch.zeros(2, WIDTH))
    assert seen.names.count("aten::topk") == 1


@pytest.mark.parametrize("loss", ["aux_batch", "aux_image"])
def test_balancing_losses_are_refused_where_experts_choose(loss: str) -> None:
    with pytest.raises(ValueError, match="even by construction"):
        MoEConfig(balance="expert_choice", **{loss: 0.01})


def test_layers_of_different_image_sizes_weigh_alike_in_the_losses() -> None:
    router = Router(WIDTH, OURS)
    initialise(router, 0)
    few, many = (router(torch.randn(2, n, WIDTH), torch.zeros(2, WIDTH))[1] for n in (4, 16))
    for name in ("aux_batch", "aux_image", "z_loss"):
        cfg = OURS.model_copy(update={name: 0.5})

        def loss(*routings: Routing, cfg: MoEConfig = cfg) -> Tensor:
            return auxiliary_loss(cfg, routings, global_batch=2, everywhere=lambda counts: counts)

        torch.testing.assert_close(loss(few, many), loss(few) + loss(many))
        torch.testing.assert_close(loss(many, few), loss(few) + loss(many))
