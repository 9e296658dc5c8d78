"""Triton kernels against the plain twins, in Triton's interpreter on a CPU: no GPU runs here."""

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from parallel.kernels import gpu, native
from parallel.kernels.depthwise import mix, split_phases
from parallel.kernels.heads import cosine_heads
from parallel.kernels.norm import gated, gated_norm, modulate
from parallel.kernels.phases import attention
from pretrain.models.attention import PhaseAttention, rope_table
from pretrain.models.init import initialise

Tensors = tuple[Tensor, ...]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
# Of the largest value. bfloat16 has 8 bits, and the twins round to it more often than the kernels.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


def run(function: Callable[..., Tensors], given: Tensors, way: str) -> Tensors:
    """Values and gradients, in Triton or by the plain twins."""
    native.library = lambda: None  # type: ignore[assignment]
    gpu.in_interpreter = way == "triton"
    given = tuple(v.clone().requires_grad_() for v in given)
    outs = function(*given)
    torch.manual_seed(1)
    grads = [torch.randn_like(out) for out in outs]
    return (*(out.detach() for out in outs), *torch.autograd.grad(outs, given, grads))


def compare(function: Callable[..., Tensors], given: Tensors) -> None:
    """Near the plain twins, in their dtypes and shapes; two runs have equal bits."""
    want, got, again = (run(function, given, way) for way in ("plain", "triton", "triton"))
    for one, two, three in zip(got, want, again, strict=True):
        assert torch.equal(one, three)
        assert one.dtype == two.dtype
        assert one.isfinite().all()
        # why: gradients of q and k are rounding alone where a set has one token
        atol = TOLERANCE[given[0].dtype] * max(two.abs().max().item(), 1e-4)
        torch.testing.assert_close(one, two, rtol=0, atol=atol)


def check_depthwise() -> None:
    # Fewer rows a program than images have, so that they end inside and between runs.
    gpu.kernels("depthwise")._ROWS = 6
    cases = [
        (1, (3, 5), 20, False, False, torch.float32),
        (3, (8, 6), 20, True, True, torch.float32),  # two turns; strips beyond images and batch
        (1, (2, 8), 68, False, True, torch.bfloat16),
    ]
    for images, size, channels, gelu, split, dtype in cases:
        torch.manual_seed(0)
        x = torch.randn(images, *size, channels, dtype=dtype)
        weight = (torch.randn(channels, 1, 5, 5) / 5).to(dtype)
        given = (x, weight, torch.randn(channels, dtype=dtype))

        def ours(*v: Tensor, gelu: bool = gelu, split: bool = split) -> Tensors:
            return (mix(*v, gelu=gelu, split=split),)

        compare(ours, given)


def check_norm() -> None:
    gpu.kernels("norm")._RUN = 16
    cases = [(2, 6, 20, True, torch.float32), (1, 4, 96, False, torch.bfloat16)]
    for images, size, channels, phases, dtype in cases:
        torch.manual_seed(0)
        x, out = torch.randn(2, images, size, size, channels, dtype=dtype)
        out = split_phases(out) if phases else out

        def ours(x: Tensor, out: Tensor, vectors: Tensor, phases: bool = phases) -> Tensors:
            gate, shift, scale = vectors.view(x.shape[0], 1, 1, -1).chunk(3, -1)
            x1, h = gated_norm(x, out, gate, shift, scale, phases=phases)
            return x1, h, modulate(x, shift, scale), gated(x, x.flip(1), gate)

        compare(ours, (x, out, torch.randn(images, 3 * channels, dtype=dtype)))


def check_heads() -> None:
    for dtype, images, size in ((torch.float32, 2, 20), (torch.bfloat16, 1, 96)):
        torch.manual_seed(0)
        x, angle = torch.randn(images, 16, 3, size, dtype=dtype), torch.rand(16, size // 2)
        rope = torch.stack([angle.cos(), angle.sin()])
        x[0, 3, 1] = 0  # a head without a length
        compare(lambda x, s, r=rope: (cosine_heads(x, r, s),), (x, 1 + torch.rand(3)))
        compare(lambda x, r=rope: (cosine_heads(x, r, None),), (x,))
        x[0, 5, 2, 7] = float("nan")
        assert (
            run(lambda x, r=rope: (cosine_heads(x, r, None),), (x,), "triton")[0][0, 5, 2]
            .isnan()
            .all()
        )


def phases(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensors:
    """Of (S, n, nh, hd), as the model calls it."""
    return (attention(*(t.transpose(1, 2) for t in (q, k, v)), scale).transpose(1, 2),)


def check_phases() -> None:
    cases = [
        (4, 24, None, torch.float32),  # tokens and channels filled up
        (9, 20, 1.0, torch.float32),  # sets that start inside a block of 16
        (16, 48, 1.0, torch.float32),
        (16, 96, None, torch.float32),
        (1, 8, None, torch.bfloat16),
        (4, 24, 1.0, torch.bfloat16),
        (16, 96, None, torch.bfloat16),
        (16, 128, None, torch.bfloat16),
    ]
    for tokens, size, scale, dtype in cases:
        torch.manual_seed(0)
        given = tuple(torch.randn(3, 8, tokens, 3, size, dtype=dtype))
        compare(lambda *v, scale=scale: phases(*v, scale), given)


def check_phases_registered() -> None:
    torch.manual_seed(0)
    gpu.in_interpreter = True
    given = tuple(torch.randn(4, 4, 9, 2, 20))
    names, checks = torch.ops.dit_pretrain, ("test_schema", "test_faketensor")
    torch.library.opcheck(names.phase_attention.default, (*given[1:], 1.0), test_utils=checks)
    backward = names.phase_attention_backward.default
    torch.library.opcheck(backward, (*given, 1.0), test_utils=checks)
    # In a compiled graph it is the same kernel.
    compiled = torch.compile(phases, backend="aot_eager", fullgraph=True)
    both = (run(way, given[1:], "triton") for way in (phases, compiled))
    assert all(map(torch.equal, *both))


def check_phases_in_the_model() -> None:
    """The attention of U-DiT reaches the kernel, compiled or not, both ways."""
    kernels, launched = gpu.kernels("phases"), []
    launch = kernels.launch
    kernels.launch = lambda kernel, *a, **k: (launched.append(kernel), launch(kernel, *a, **k))
    module = PhaseAttention(48, 2)
    initialise(module, seed=0)
    rope = rope_table(2, 24)
    x = torch.randn(2, 4, 4, 48)
    want = run(lambda x: (module(x, rope),), (x,), "plain")
    for way in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        launched.clear()
        got = run(lambda x, way=way: (way(x, rope),), (x,), "triton")
        assert launched == [kernels._attention, kernels._attention_backward]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def check_phases_beyond_a_tile() -> None:
    """100 tokens an image, or a head of 132 channels: torch's own attention, same bits."""
    gpu.kernels("phases")
    for tokens, size in ((25, 8), (4, 132)):
        given = tuple(torch.randn(3, 4, tokens, 2, size))
        both = (run(phases, given, way) for way in ("plain", "triton"))
        assert all(map(torch.equal, *both))


def check_depthwise_not_finite() -> None:
    """They reach their neighbours only; outside the image they meet nothing, not zeros."""
    gpu.in_interpreter = True
    native.library = lambda: None  # type: ignore[assignment]
    x, weight, bias = torch.randn(1, 4, 4, 20), torch.ones(20, 1, 5, 5), torch.zeros(20)
    weight[19, 0, 0, 0] = float("inf")  # of the pixel two rows and two columns before
    weight.requires_grad_()
    for bad, gelu in ((float("nan"), True), (float("inf"), False)):
        x[0, 1, 1, 17] = bad
        x[0, 0, 3, 18] = bad
        y = mix(x, weight, bias, gelu=gelu)
        assert not y[0, 1, 1, 17].isfinite()
        assert y[..., :17].isfinite().all()
        assert torch.cat([y[0, 3, :, 18], y[0, :, 0, 18]]).isfinite().all()
        reached = ~y[0, ..., 19].isfinite()
        assert (reached[2:, 2:].sum(), reached.sum()) == (4, 4)
    of_weight = torch.autograd.grad(y.sum(), weight)[0]
    reached = ~of_weight[18, 0].isfinite()  # by taps that bring row 0, column 3 into the image
    assert (reached[:3, 2:].sum(), reached.sum()) == (9, 9)
    assert of_weight[:17].isfinite().all()


@needs_triton
@pytest.mark.parametrize("name", [n for n in globals() if n.startswith("check_")])
def test_triton_equals_the_plain_twins(name: str) -> None:
    """In a child, because Triton reads TRITON_INTERPRET when it is imported."""
    code = (
        "import torch; torch.set_num_threads(1); from tests.unit import test_triton_kernels as t; "
        f"t.{name}(); import sys; assert 'parallel.kernels.triton_pieces' in sys.modules"
    )
    there = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_tensors_of_a_cpu_are_not_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not gpu.fits(torch.ones(4))


def test_without_triton_a_warning_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu, "in_interpreter", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu._installed.cache_clear()
    try:
        with pytest.warns(UserWarning, match="GPU kernels are off.*no triton found"):
            assert not gpu.fits(torch.ones(4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not gpu.fits(torch.ones(4))
    finally:
        gpu._installed.cache_clear()
