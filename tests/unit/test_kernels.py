"""CPU kernels against torch in float64, values and gradients, and how they are compiled."""

import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.kernels import native
from parallel.kernels.depthwise import join_phases, mix, split_phases
from parallel.kernels.heads import cosine_heads, plain
from parallel.kernels.norm import gated, gated_norm, modulate
from parallel.kernels.swiglu import swiglu
from pretrain import config
from pretrain.models.attention import rope_table
from pretrain.models.build import build
from pretrain.models.init import initialise
from pretrain.models.udit import UDiTConfig
from tests import tiny
from tests.speed import twin

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")
Tensors = tuple[Tensor, ...]


@pytest.fixture(params=["C", "plain"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels, or their plain twins."""
    if request.param == "plain":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler")


def compare(
    ours: Callable[..., Tensors], exact: Callable[..., Tensors], given: Tensors, tolerance: float
) -> None:
    """Values and gradients of ours in float32 against exact in float64."""
    ours_in = [x.clone().requires_grad_() for x in given]
    exact_in = [x.double().requires_grad_() for x in given]
    got, want = ours(*ours_in), exact(*exact_in)
    grads = [torch.randn_like(out) for out in got]
    got += torch.autograd.grad(got, ours_in, grads)
    want += torch.autograd.grad(want, exact_in, [g.double() for g in grads])
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(
            one.double(), two, rtol=0, atol=tolerance * two.abs().max().item()
        )


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("channels", [5, 24, 130])
@pytest.mark.parametrize(("gelu", "split"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("size", [(1, 2, 2), (2, 6, 14)])
def test_mix_is_a_depthwise_convolution_with_its_shortcut(
    channels: int, gelu: bool, split: bool, size: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(*size, channels)
    weight, bias = torch.randn(channels, 1, 5, 5) / 5, torch.randn(channels)

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensors:
        a = F.gelu(x) if gelu else x
        y = F.conv2d(a.permute(0, 3, 1, 2), weight, bias, padding=2, groups=channels)
        y = a + y.permute(0, 2, 3, 1)
        return ((split_phases(y) if split else y),)

    compare(lambda *v: (mix(*v, gelu=gelu, split=split),), exact, (x, weight, bias), 2e-6)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("channels", [7, 48, 96])
@pytest.mark.parametrize(("images", "height", "width"), [(1, 2, 4), (3, 10, 12)])
@pytest.mark.parametrize("phases", [False, True])
def test_adaln_and_its_gate_equal_their_formulas(
    channels: int, images: int, height: int, width: int, phases: bool
) -> None:
    torch.manual_seed(0)
    x, out = torch.randn(2, images, height, width, channels)
    out = split_phases(out) if phases else out
    vectors = torch.randn(images, 6 * channels)

    def chunks(vectors: Tensor) -> Tensors:
        return vectors.view(images, 1, 1, -1).chunk(6, -1)

    def ours(x: Tensor, out: Tensor, vectors: Tensor) -> Tensors:
        shift, scale, gate, shift2, scale2, gate2 = chunks(vectors)
        x1, h = gated_norm(x, out, gate, shift2, scale2, phases=phases)
        return modulate(x, shift, scale), x1, h, gated(x1, h, 2 * gate2)

    def exact(x: Tensor, out: Tensor, vectors: Tensor) -> Tensors:
        shift, scale, gate, shift2, scale2, gate2 = chunks(vectors)
        x1 = x + gate * (join_phases(out, height, width) if phases else out)
        h = F.layer_norm(x1, (channels,), eps=1e-6) * (1 + scale2) + shift2
        first = F.layer_norm(x, (channels,), eps=1e-6) * (1 + scale) + shift
        return first, x1, h, x1 + 2 * gate2 * h

    compare(ours, exact, (x, out, vectors), 3e-6)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("head_dim", [4, 24, 48, 96])
@pytest.mark.parametrize(("sets", "grid", "heads"), [(1, 1, 1), (2, 5, 3)])
def test_cosine_heads_turn_and_have_length_one(
    head_dim: int, sets: int, grid: int, heads: int
) -> None:
    torch.manual_seed(0)
    rope = rope_table(grid, head_dim)
    x, scale = torch.randn(sets, grid * grid, heads, head_dim), 1 + torch.rand(heads)

    def exact(x: Tensor, scale: Tensor) -> Tensors:
        cos, sin = rope.double()[:, None, :, None].unbind(0)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        return (F.normalize(turned, dim=-1) * scale[:, None],)

    compare(lambda x, scale: (cosine_heads(x, rope, scale),), exact, (x, scale), 2e-6)
    torch.testing.assert_close(cosine_heads(x, rope, None), plain(x, rope, None))


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("shape", [(3,), (5, 96), (130, 384)])  # the last: more than one task
def test_swiglu_is_its_formula(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gate, up = 20 * torch.randn(shape), torch.randn(shape)
    compare(lambda g, u: (swiglu(g, u),), lambda g, u: (F.silu(g) * u,), (gate, up), 1e-6)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_out_so(bad: float) -> None:
    x, weight, bias = torch.randn(1, 4, 4, 20), torch.ones(20, 1, 5, 5), torch.zeros(20)
    x[0, 1, 1, 17] = bad
    assert not mix(x, weight, bias)[0, 1, 1, 17].isfinite()
    assert mix(x, weight, bias)[..., :17].isfinite().all()
    shift = scale = torch.zeros(1, 1, 1, 20)
    assert not modulate(x, shift, scale)[0, 1, 1].isfinite().any()
    heads = cosine_heads(x.view(1, 16, 1, 20), rope_table(4, 20), None)
    assert not heads[0, 5].isfinite().all()
    assert torch.equal(swiglu(x, x).isfinite(), x.isfinite())
    if bad != -float("inf"):  # whose GELU is 0 or NaN, by the formula
        assert not mix(x, weight, bias, gelu=True)[0, 1, 1, 17].isfinite()


@needs_compiler
def test_an_image_does_not_know_of_the_others() -> None:
    torch.manual_seed(0)
    x, out, vectors = torch.randn(3, 6, 6, 40), torch.randn(3, 6, 6, 40), torch.randn(3, 120)

    def run(of: slice) -> Tensors:
        given = [v[of].clone().requires_grad_() for v in (x, out, vectors)]
        gate, shift, scale = given[2].view(-1, 1, 1, 120).chunk(3, -1)
        x1, h = gated_norm(given[0], given[1], gate, shift, scale)
        return (h, *torch.autograd.grad((x1 * h).sum(), given))

    for one, all_three in zip(run(slice(1, 2)), run(slice(0, 3)), strict=True):
        assert torch.equal(one[0], all_three[1])


@needs_compiler
def test_two_threads_give_the_bits_of_one() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 6, 6, 80), torch.randn(80, 1, 5, 5), torch.randn(80)
    vectors, scale = torch.randn(3, 240), torch.ones(4)

    def run(threads: int) -> Tensors:
        torch.set_num_threads(threads)
        given = [v.clone().requires_grad_() for v in (x, weight, bias, vectors, scale)]
        y = mix(*given[:3], gelu=True, split=True)
        gate, shift, size = given[3].view(-1, 1, 1, 240).chunk(3, -1)
        x1, h = gated_norm(given[0], y, gate, shift, size, phases=True)
        turned = cosine_heads(h.view(3, 36, 4, 20), rope_table(6, 20), given[4])
        return (turned, *torch.autograd.grad(turned.square().sum() + (x1 * h).sum(), given))

    one, two = run(1), run(2)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("operator", ["mix", "norm", "cosine_heads", "swiglu"])
def test_operators_are_registered_as_torch_asks(operator: str) -> None:
    x, vector = torch.randn(2, 4, 4, 8), torch.randn(2, 8)
    args = {
        "mix": (x, torch.randn(8, 1, 5, 5), torch.randn(8), True, True),
        "norm": (x, vector, vector),
        "cosine_heads": (x, torch.randn(2, 4, 8), torch.randn(4)),
        "swiglu": (x, x + 1),
    }[operator]
    checks = ("test_schema", "test_faketensor")
    found = getattr(torch.ops.dit_pretrain, operator).default
    torch.library.opcheck(found, args, test_utils=checks)


def test_the_plain_twin_computes_what_our_model_does() -> None:
    tree = tiny.MODELS["udit"] | {"input_size": 16, "in_channels": 4, "num_classes": 10}
    model = build(config.part(UDiTConfig, tree))
    initialise(model, seed=0, zero_std=0.05)
    torch.manual_seed(0)
    x, t, labels = torch.randn(2, 4, 16, 16), torch.rand(2) * 1000, torch.arange(2)
    outs = model(x, t, labels), twin.forward(model, x, t, labels)  # type: ignore[arg-type]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    parameters = [p for n, p in model.named_parameters() if not n.endswith("core.k.bias")]
    for one, two in zip(
        *(torch.autograd.grad(o.square().sum(), parameters) for o in outs), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-3 * two.abs().max().item() + 1e-6)


def test_without_a_compiler_a_warning_says_so_once_and_values_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    x, weight, bias = torch.randn(1, 4, 4, 8), torch.randn(8, 1, 5, 5), torch.randn(8)
    want = mix(x, weight, bias)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="CPU kernels are off.*no C compiler.*gcc"):
            first = mix(x, weight, bias)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(mix(x, weight, bias), first)
    finally:
        native.library.cache_clear()
    torch.testing.assert_close(first, want)


@needs_compiler
def test_processes_that_compile_at_once_all_get_a_whole_library(tmp_path: Path) -> None:
    code = "from parallel.kernels import native; native._FLAGS = ('-O0', *native._FLAGS[1:]); "
    code += "assert native.library() is not None"
    there = os.environ | {"PRETRAIN_CACHE": str(tmp_path)}
    children = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", code], env=there) for _ in "12"
    ]
    assert [child.wait() for child in children] == [0, 0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]
    assert len(list(tmp_path.iterdir())) == 1


def _in_child(queue: "multiprocessing.SimpleQueue[float]") -> None:
    torch.set_num_threads(1)
    queue.put(mix(torch.ones(2, 4, 4, 8), torch.ones(8, 1, 5, 5), torch.ones(8)).sum().item())


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_the_kernels_use_the_openmp_that_torch_uses() -> None:
    """In a process of its own: other libraries bring theirs into this one."""
    code = (
        "import torch; from parallel.kernels import native; assert native.library() is not None;"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l}))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "1"


@needs_compiler
def test_a_fork_with_one_thread_does_not_hang() -> None:
    given = torch.ones(2, 4, 4, 8), torch.ones(8, 1, 5, 5), torch.ones(8)
    torch.set_num_threads(2)
    want = mix(*given).sum().item()
    torch.set_num_threads(1)
    queue = (fork := multiprocessing.get_context("fork")).SimpleQueue()
    child = fork.Process(target=_in_child, args=(queue,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == want
