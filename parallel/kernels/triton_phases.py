"""phases.py's operators in Triton: the token sets of an image and head as one masked tile.

A program has one head of one image, all its tokens at once: rows of padding form sets of their own,
so that every row sees a token. Logits, softmax and sums are float32; products read the dtype that
came in. Every number is stored by one program, once: no atomics. Source: FlashAttention's backward,
over a single tile.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels.triton_pieces import launch

_LEAST = 16  # rows and channels that a product of tiles needs
# why: float32 as three products in TF32, whose error is near float32's. As "ieee" such a tile goes
# through scalar units: ptxas spilled 9-19 KB a thread on sm_90 and took 90 s for backward.
_PRECISION = tl.constexpr("tf32x3")
# why: Triton's interpreter (3.9) would multiply the bits of bfloat16 as integers.
_WIDEN = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def attention(q: Tensor, k: Tensor, v: Tensor, factor: float) -> Tensor:
    """q, k, v: (S, n, nh, hd), set 4·image + phase, contiguous. See phases.attention."""
    out = torch.empty_like(q)
    _launch(_attention, (q, k, v, out), factor)
    return out


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. The softmax is computed again: all it needs is in the tile."""
    of_q, of_k, of_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _launch(_attention_backward, (grad, q, k, v, of_q, of_k, of_v), factor)
    return of_q, of_k, of_v


def _launch(kernel: object, given: tuple[Tensor, ...], factor: float) -> None:
    sets, n, heads, size = given[0].shape
    tokens = max(_LEAST, triton.next_power_of_2(4 * n))
    channels = max(_LEAST, triton.next_power_of_2(size))
    sizes = {"n": n, "size": size, "block_t": tokens, "block_d": channels}
    launch(kernel, (sets // 4 * heads,), *given, heads, factor, **sizes)


@triton.jit
def _tile(heads, n: tl.constexpr, size: tl.constexpr, block_t: tl.constexpr, block_d: tl.constexpr):
    """Where the tokens of this program's head of an image lie, and which of them exist."""
    image = (tl.program_id(0) // heads).to(tl.int64)
    t, d = tl.arange(0, block_t), tl.arange(0, block_d)
    row = (image * 4 * n + t) * heads + tl.program_id(0) % heads
    return row[:, None] * size + d[None, :], (t < 4 * n)[:, None] & (d < size)[None, :]


@triton.jit
def _product(a, b):
    """a·b of one dtype, summed in float32."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=_PRECISION)


@triton.jit
def _probabilities(q, k, factor, n: tl.constexpr, block_t: tl.constexpr):
    """Of each token over the tokens of its set, float32."""
    logits = _product(q, tl.trans(k)) * factor
    of = tl.arange(0, block_t) // n
    logits = tl.where(of[:, None] == of[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 1, keep_dims=True))
    return weights / tl.sum(weights, 1, keep_dims=True)


@triton.jit
def _attention(
    q,
    k,
    v,
    out,
    heads,
    factor,
    n: tl.constexpr,
    size: tl.constexpr,
    block_t: tl.constexpr,
    block_d: tl.constexpr,
):
    at, inside = _tile(heads, n, size, block_t, block_d)
    queries = tl.load(q + at, inside, other=0.0)
    keys = tl.load(k + at, inside, other=0.0)
    probs = _probabilities(queries, keys, factor, n, block_t)
    values = tl.load(v + at, inside, other=0.0)
    total = _product(probs.to(values.dtype), values)
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


@triton.jit
def _attention_backward(
    grad,
    q,
    k,
    v,
    of_q,
    of_k,
    of_v,
    heads,
    factor,
    n: tl.constexpr,
    size: tl.constexpr,
    block_t: tl.constexpr,
    block_d: tl.constexpr,
):
    at, inside = _tile(heads, n, size, block_t, block_d)
    queries = tl.load(q + at, inside, other=0.0)
    keys = tl.load(k + at, inside, other=0.0)
    probs = _probabilities(queries, keys, factor, n, block_t)
    g = tl.load(grad + at, inside, other=0.0)
    to_v = _product(tl.trans(probs.to(g.dtype)), g)
    tl.store(of_v + at, to_v.to(of_v.dtype.element_ty), inside)
    values = tl.load(v + at, inside, other=0.0)
    to_probs = _product(g, tl.trans(values))
    delta = tl.sum(probs * to_probs, 1, keep_dims=True)
    to_logits = (probs * (to_probs - delta) * factor).to(g.dtype)
    to_q = _product(to_logits, keys)
    tl.store(of_q + at, to_q.to(of_q.dtype.element_ty), inside)
    to_k = _product(tl.trans(to_logits), queries)
    tl.store(of_k + at, to_k.to(of_k.dtype.element_ty), inside)
