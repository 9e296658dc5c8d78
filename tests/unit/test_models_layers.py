"""The layers against arithmetic: starts, tables, patches, phases, rotary positions, kernels."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.kernels.depthwise import join_phases, split_phases
from parallel.kernels.heads import rotate
from pretrain.models.attention import Attention, rope_table
from pretrain.models.init import (
    Fill,
    Normal,
    Table,
    Xavier,
    Zero,
    _normal,
    _Stream,
    _uniform,
    initialise,
    xavier_conv,
)
from pretrain.models.layers import (
    Conditioning,
    Conv,
    Linear,
    PatchEmbed,
    PatchHead,
    layer_norm,
    position_table,
    sinusoid,
    tanh_gelu,
)
from pretrain.models.rep import Factored, FeedForward, Kernels
from pretrain.models.udit import Down, Up


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def test_sinusoid_is_cosines_then_sines() -> None:
    t = torch.tensor([0.0, 3.0, 999.0])
    waves = sinusoid(t)
    assert waves.shape == (3, 256)
    assert waves[0].tolist() == [1.0] * 128 + [0.0] * 128
    for i in (0, 1, 64, 127):
        rate = 10_000 ** (-i / 128)
        assert waves[1, i] == pytest.approx(math.cos(3 * rate), abs=1e-6)
        assert waves[2, 128 + i] == pytest.approx(math.sin(999 * rate), abs=2e-4)


def test_positions_put_the_column_first() -> None:
    table = position_table(16, 3).view(3, 3, 16)
    row, column, j = 2, 1, 3
    rate = 10_000 ** (-j / 4)
    assert table[row, column, j] == pytest.approx(math.sin(column * rate))
    assert table[row, column, 4 + j] == pytest.approx(math.cos(column * rate))
    assert table[row, column, 8 + j] == pytest.approx(math.sin(row * rate))
    assert table[row, column, 12 + j] == pytest.approx(math.cos(row * rate))


def test_patch_embedding_is_the_strided_convolution() -> None:
    layer = PatchEmbed(4, 2, 8)
    initialise(layer, 0, zero_std=1.0)
    x = torch.randn(2, 4, 6, 6)
    want = F.conv2d(x, layer.weight.view(8, 4, 2, 2), layer.bias, stride=2)
    torch.testing.assert_close(layer(x), want.flatten(2).transpose(1, 2))


def test_patch_head_lays_out_row_column_channel() -> None:
    width, patch, channels, grid = 24, 2, 6, 2
    head = PatchHead(width, patch, channels)
    initialise(head, 0)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(patch * patch * channels))
    x = torch.randn(1, grid * grid, width)
    out = head(x, Conditioning(torch.zeros(1, width), torch.zeros(1, width), None), grid)
    token, row, column, channel = 3, 1, 0, 4
    value = layer_norm(x)[0, token, (row * patch + column) * channels + channel]
    # why: close, not equal: the head's norm is our kernel, whose sums have another order.
    torch.testing.assert_close(out[0, channel, 1 * patch + row, 1 * patch + column], value)


def test_convolutions_take_tokens_channels_last_without_a_copy() -> None:
    layer = Conv(6, 8, 3)
    initialise(layer, 0, zero_std=1.0)
    x = torch.randn(2, 5, 5, 6)
    out = layer(x)
    want = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(out, want.permute(0, 2, 3, 1))
    assert out.is_contiguous()


def test_down_and_up_are_torchs_pixel_order() -> None:
    down, up = Down(8), Up(8)
    initialise(down, 0)
    initialise(up, 0)
    x = torch.randn(2, 4, 4, 8)
    images = x.permute(0, 3, 1, 2)
    want = F.pixel_unshuffle(F.conv2d(images, down.conv.weight, padding=1), 2)
    torch.testing.assert_close(down(x), want.permute(0, 2, 3, 1))
    want = F.pixel_shuffle(F.conv2d(images, up.conv.weight, padding=1), 2)
    torch.testing.assert_close(up(x), want.permute(0, 2, 3, 1))


def test_phases_are_token_sets_of_every_second_pixel() -> None:
    x = torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3)
    sets = split_phases(x)
    assert sets.shape == (8, 6, 3)
    for dy in (0, 1):
        for dx in (0, 1):
            want = x[1, dy::2, dx::2].reshape(6, 3)
            assert torch.equal(sets[4 + 2 * dy + dx], want)
    assert torch.equal(join_phases(sets, 4, 6), x)


def test_rotary_scores_depend_on_the_offset_alone() -> None:
    grid, head_dim = 6, 16
    table = rope_table(grid, head_dim)
    q, k = torch.randn(2, head_dim).unbind(0)
    every = torch.stack([q, k])[:, None].expand(2, grid * grid, head_dim)
    turned = rotate(every[:, :, None], table)[:, :, 0]
    score = turned[0] @ turned[1].T

    def at(row: int, column: int) -> int:
        return row * grid + column

    base = score[at(0, 1), at(2, 4)]
    torch.testing.assert_close(score[at(3, 2), at(5, 5)], base)
    torch.testing.assert_close(score[at(1, 0), at(3, 3)], base)
    assert (score[at(0, 1), at(2, 5)] - base).abs() > 1e-3
    assert (score[at(0, 1), at(3, 4)] - base).abs() > 1e-3
    torch.testing.assert_close(turned.norm(dim=-1), every.norm(dim=-1))


def test_rotary_pairs_alternate_between_column_and_row() -> None:
    cos, sin = rope_table(4, 8)
    token = 2 * 4 + 3  # row 2, column 3
    rates = [10_000 ** (-4 * i / 8) for i in (0, 1)]
    angles = [3 * rates[0], 2 * rates[0], 3 * rates[1], 2 * rates[1]]
    assert cos[token].tolist() == pytest.approx([math.cos(a) for a in angles])
    assert sin[token].tolist() == pytest.approx([math.sin(a) for a in angles])


@pytest.mark.parametrize("kind", ["dot", "norm", "cosine"])
def test_attention_is_the_written_out_softmax(kind: str) -> None:
    heads, width, tokens = 2, 16, 9
    layer = Attention(width, heads, kind)  # type: ignore[arg-type]
    initialise(layer, 0, zero_std=0.2)
    x, table = torch.randn(3, tokens, width), rope_table(3, 8)
    rope = table if kind == "cosine" else None
    q, k, v = (part(x).view(3, tokens, heads, 8) for part in (layer.q, layer.k, layer.v))
    scale = torch.full((heads,), 8**-0.5)
    if kind == "norm":
        q, k = layer.q_norm(q), layer.k_norm(k)
    if kind == "cosine":
        q, k = rotate(q, table), rotate(k, table)
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        scale = layer.logit_scale.exp()
        torch.testing.assert_close(scale, torch.full((heads,), 10.0))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale[:, None, None]
    want = layer.out(torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v).flatten(2))
    torch.testing.assert_close(layer(x, rope), want, atol=1e-5, rtol=1e-5)


def test_cosine_scale_is_clamped_at_a_hundred() -> None:
    layer = Attention(8, 1, "cosine")
    initialise(layer, 0)
    with torch.no_grad():
        layer.logit_scale.fill_(9.0)
    q, _ = layer._prepare(torch.randn(1, 4, 1, 8), torch.randn(1, 4, 1, 8), None)
    torch.testing.assert_close(q.norm(dim=-1), torch.full((1, 4, 1), 100.0))


def test_feed_forward_is_the_published_sum_of_kernels() -> None:
    width, hidden = 6, 12
    layer = FeedForward(width, hidden, "trained")
    initialise(layer, 0, zero_std=0.3)
    assert isinstance(layer.expand, Factored)
    assert isinstance(layer.mix, Kernels)
    assert isinstance(layer.contract, Factored)
    x = torch.randn(2, 5, 5, width)

    def pointwise(z: Tensor, part: Factored) -> Tensor:
        for linear in (part.first, part.second):
            z = F.conv2d(z, linear.weight[:, :, None, None], linear.bias)
        return z

    z = pointwise(x.permute(0, 3, 1, 2), layer.expand)
    z = 0.5 * z * (1 + torch.erf(z / 2**0.5))
    mixed = z.clone()
    for conv, pad in ((layer.mix.five, 2), (layer.mix.three, 1), (layer.mix.one, 0)):
        mixed = mixed + F.conv2d(z, conv.weight, conv.bias, padding=pad, groups=hidden)
    want = pointwise(mixed, layer.contract).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


def test_starts_have_their_bounds_and_deviations() -> None:
    class Leaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inits = {
                "a": Xavier(100, 500),
                "b": Normal(0.02),
                "c": Zero(),
                "d": Fill(2.5),
                "e": Table(lambda: torch.arange(3.0)),
                "f": xavier_conv((64, 1, 5, 5)),
            }
            for name, shape in {"a": (300, 100), "b": (301, 101), "c": (77,), "d": ()}.items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
            self.f = nn.Parameter(torch.empty(64, 1, 5, 5))
            self.register_buffer("e", torch.empty(3))

    leaf = Leaf()
    initialise(leaf, 7)
    bound = math.sqrt(6 / 600)
    assert bound * 0.999 < leaf.a.abs().max() <= bound
    assert leaf.a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert leaf.b.std().item() == pytest.approx(0.02, rel=0.02)
    assert leaf.b.mean().abs() < 5e-4
    assert (leaf.b > 0.06).any()
    assert leaf.c.eq(0).all()
    assert leaf.d.item() == 2.5
    assert leaf.e.tolist() == [0, 1, 2]
    assert leaf.f.abs().max() <= math.sqrt(6 / (25 + 64 * 25))
    b = leaf.b.clone()
    initialise(leaf, 7, zero_std=0.05)
    assert torch.equal(leaf.b, b)
    assert leaf.c.std().item() == pytest.approx(0.05, rel=0.3)
    initialise(leaf, 8)
    assert not torch.equal(leaf.b, b)


def test_rows_have_an_address_of_their_own() -> None:
    tall, short = nn.ModuleDict({"x": Linear(5, 9)}), nn.ModuleDict({"x": Linear(5, 4)})
    for each in (tall, short):
        each["x"].inits["weight"] = Normal(1.0)
        initialise(each, 3)
    assert torch.equal(tall["x"].weight[:4], short["x"].weight)
    other = nn.ModuleDict({"y": Linear(5, 9)})
    other["y"].inits["weight"] = Normal(1.0)
    initialise(other, 3)
    assert not torch.equal(tall["x"].weight, other["y"].weight)


@pytest.mark.parametrize("draw", [_uniform, _normal])
def test_rows_in_the_middle_are_reached_by_themselves(draw: Callable[..., np.ndarray]) -> None:
    stream = _Stream(5, "name", draw, 1.0)
    whole = stream.rows(0, 7, 13)
    assert np.array_equal(whole[3:6], stream.rows(3, 6, 13))
    assert len(np.unique(whole)) == whole.size


def test_a_tensor_without_a_declared_start_is_named() -> None:
    model = nn.ModuleDict({"inner": nn.Linear(2, 2)})
    with pytest.raises(AssertionError, match=r"inner\.weight declares no init"):
        initialise(model, 0)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_what_a_compiler_reads_of_the_gelu_is_the_gelu(dtype: torch.dtype, near: float) -> None:
    x = torch.linspace(-12, 12, 999).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    compiled = torch.compile(tanh_gelu, backend="aot_eager", fullgraph=True)
    outs = compiled(x), F.gelu(exact, approximate="tanh")
    assert outs[0].dtype == dtype
    grads = [torch.autograd.grad(o.sum(), i)[0] for o, i in zip(outs, (x, exact), strict=True)]
    for got, want in (outs, grads):
        torch.testing.assert_close(got.double(), want, rtol=near, atol=near)
