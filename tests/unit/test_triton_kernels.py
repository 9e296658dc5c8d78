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
        atol = TOLERANCE[given[0].dtype] * two.abs().max().item()
        torch.testing.assert_close(one, two, rtol=0, atol=atol)


def check_depthwise() -> None:
    gpu.kernels("depthwise")._RUN = 16  # so that images of 6·6 have several
    cases = [
        (1, 4, 20, False, False, torch.float32),
        (2, 6, 20, True, True, torch.float32),
        (1, 4, 96, False, True, torch.bfloat16),
    ]
    for images, size, channels, gelu, split, dtype in cases:
        torch.manual_seed(0)
        x = torch.randn(images, size, size, channels, dtype=dtype)
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


def check_depthwise_not_finite() -> None:
    gpu.in_interpreter = True
    native.library = lambda: None  # type: ignore[assignment]
    x, weight, bias = torch.randn(1, 4, 4, 20), torch.ones(20, 1, 5, 5), torch.zeros(20)
    for bad, gelu in ((float("nan"), True), (float("inf"), False)):
        x[0, 1, 1, 17] = bad
        y = mix(x, weight, bias, gelu=gelu)
        assert not y[0, 1, 1, 17].isfinite()
        assert y[..., :17].isfinite().all()


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
