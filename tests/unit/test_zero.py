"""ZeRO against a plain run of one process, with tensor and expert parallelism."""

import zlib
from collections.abc import Iterable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import launch, remat
from parallel.deepspeed import ZeRO, check
from parallel.errors import LayoutError
from parallel.mesh import ALONE, Axis, Degrees, Mesh
from parallel.shards import Box
from parallel.tensor import Hold, apply, gather, scatter
from tests import ranks

STEPS, BATCH, WIDTH, EXPERTS = 5, 16, 6, 2
TOLERANCE = 1e-6  # ‖a−b‖/‖b‖ of a logical tensor after STEPS


class Linear(nn.Linear):
    inits: Mapping[str, Any] = {}
    cuts = {"weight": 0, "bias": 0}


class Plain(nn.Module):
    """Odd sizes, a scalar, a buffer; `inner` and `outer` are cut under tensor parallelism."""

    tensor_plan = {"enter": "enter", "inner": "column", "outer": "row", "last": "gathered"}

    def __init__(self) -> None:
        super().__init__()
        self.first = Linear(5, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.enter = nn.Identity()
        self.inner = Linear(WIDTH, 8)
        self.outer = Linear(8, WIDTH)
        self.last = Linear(WIDTH, 4)
        self.scale = nn.Parameter(torch.empty(()))
        self.odd = nn.Parameter(torch.empty(11))
        self.register_buffer("table", torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        h = h + self.outer(F.gelu(self.inner(self.enter(h))))
        return self.last(h) * self.scale + self.odd.square().sum() + self.table


class Routed(nn.Module):
    """A dense layer, then two experts; a sample's own sign chooses. Dispatch by plain sums."""

    def __init__(self, tp: Axis = ALONE, ep: Axis = ALONE) -> None:
        super().__init__()
        self.tp, self.ep = tp, ep
        self.first = Linear(5, WIDTH)
        self.experts = nn.Parameter(torch.empty(EXPERTS // ep.size, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        rows = scatter(torch.cat([h, (x[:, :1] > 0).float()], dim=1), self.tp, 0)
        out = [torch.zeros_like(rows)] * self.ep.size
        out[self.ep.rank] = rows
        everywhere = _Sum.apply(torch.cat(out), self.ep)
        mine = torch.zeros_like(everywhere[:, :-1])
        for index, weight in enumerate(self.experts, self.ep.rank * len(self.experts)):
            chosen = (everywhere[:, -1] == index).float()[:, None]
            mine = mine + chosen * F.gelu(everywhere[:, :-1] @ weight)
        back = _Sum.apply(mine, self.ep).chunk(self.ep.size)[self.ep.rank]
        return h + gather(back, self.tp, 0)


class _Sum(torch.autograd.Function):
    """Sum over an axis whose ranks have losses of their own: the gradient is summed too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _Sum._over(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Sum._over(grads[0], ctx.axis), None

    @staticmethod
    def _over(x: Tensor, axis: Axis) -> Tensor:
        x = x.clone()
        if axis.size > 1:
            dist.all_reduce(x, group=axis.group)
        return x


class Adam:
    """AdamW on flat values, the same for both sides. Skips when told, as the guard does."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = values
        self.state = {n: (torch.zeros_like(v), torch.zeros_like(v)) for n, v in values.items()}
        self.step_no = 0

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor]) -> None:
        self.step_no += 1
        for name, value in self.values.items():
            mean, square = self.state[name]
            mean.lerp_(gradients[name], 0.1)
            square.lerp_(gradients[name].square(), 0.01)
            rise = mean / (1 - 0.9**self.step_no)
            size = (square / (1 - 0.99**self.step_no)).sqrt() + 1e-2
            value.mul_(1 - 1e-3).sub_(0.02 * rise / size)


def start_value(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * 0.5


def fill(boxes: Mapping[str, Box], name: str, tensor: Tensor) -> None:
    box = boxes.get(name)
    whole = start_value(name, box.shape if box else tuple(tensor.shape))
    if box:
        cut = (slice(o, o + n) for o, n in zip(box.offset, box.sizes, strict=True))
        whole = whole[tuple(cut)]
    tensor.copy_(whole)


def batch(step: int) -> Tensor:
    return torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step))


def loss_of(out: Tensor) -> Tensor:
    return out.square().sum() / BATCH


def reference(model: nn.Module, steps: int = STEPS) -> dict[str, Tensor]:
    """Parameters after a plain run."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data.copy_(start_value(name, tuple(tensor.shape)))
    named = dict(model.named_parameters())
    adam = Adam({name: p.detach() for name, p in named.items()})
    for step in range(steps):
        grads = torch.autograd.grad(loss_of(model(batch(step))), list(named.values()))
        adam.step(dict(zip(named, grads, strict=True)))
    return {name: p.detach().clone() for name, p in named.items()}


def assemble(zero: ZeRO, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole logical tensors from all ranks; asserts that counted pieces tile each exactly once."""
    own = {n: (p.extent, flat[n].clone()) for n, p in zero.pieces.items() if p.counted}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    out = {}
    for name, piece in zero.pieces.items():
        whole = torch.full(piece.extent.box.shape, torch.nan)
        times = torch.zeros(piece.extent.box.shape)
        for extent, values in (part[name] for part in everyone if name in part):
            for box, place in extent.boxes():
                cut = tuple(slice(o, o + n) for o, n in zip(box.offset, box.sizes, strict=True))
                whole[cut] = values[place : place + box.numel].view(box.sizes)
                times[cut] += 1
        assert bool((times == 1).all()), f"{name}: an element is owned {times.unique()} times"
        out[name] = whole
    return out


def masters(zero: ZeRO) -> dict[str, Tensor]:
    return {name: piece.values for name, piece in zero.pieces.items()}


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], label: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, whole in theirs.items():
        off = float((ours[name] - whole.detach()).norm() / whole.detach().norm())
        assert off <= TOLERANCE, f"{label}: {name} is off by {off:.1e}"


def accumulate(zero: ZeRO, mesh: Mesh, step: int, accum: int) -> None:
    mine = batch(step).chunk(mesh.sizes.data)[mesh.rank // mesh.sizes.tp]
    for index, micro in enumerate(mine.chunk(accum)):
        zero.backward(loss_of(zero.model(micro)), last=index == accum - 1)


def train(zero: ZeRO, mesh: Mesh, accum: int, steps: Iterable[int] = range(STEPS)) -> None:
    adam = Adam(masters(zero))
    for step in steps:
        accumulate(zero, mesh, step, accum)
        zero.step(lambda: adam.step(zero.gradients()))


def build(model: nn.Module, mesh: Mesh, stage: int, **more: Any) -> ZeRO:
    boxes = dict(more.pop("boxes", {}))
    for path, module in model.named_modules():
        boxes |= {f"{path}.{name}": box for name, box in getattr(module, "boxes", {}).items()}
    filling = partial(fill, boxes)
    device = torch.device("cpu")
    return ZeRO(model, stage=stage, mesh=mesh, device=device, fill=filling, boxes=boxes, **more)


def on_meta(make: type[nn.Module], *args: Any) -> nn.Module:
    with torch.device("meta"):
        return make(*args)


def join(sizes: Degrees) -> Mesh:
    if not dist.is_initialized():
        launch.join(launch.Place.here(), threads=1, timeout=timedelta(seconds=60))
    return Mesh(sizes, "cpu")


def check_gradients(zero: ZeRO, mesh: Mesh, whole: nn.Module) -> None:
    """Gradients before the step, whole and summed, are those of the plain model."""
    accumulate(zero, mesh, 0, 2)
    named = dict(whole.named_parameters())
    grads = torch.autograd.grad(loss_of(whole(batch(0))), list(named.values()))
    compare(assemble(zero, zero.gradients()), dict(zip(named, grads, strict=True)), "gradients")
    zero.step(lambda: None)


def check_skip_and_publish(zero: ZeRO, mesh: Mesh) -> None:
    """A left-out update changes no bit, even with NaN; changed pieces reach the model."""
    x = batch(7)
    with torch.no_grad():
        before, out = {n: v.clone() for n, v in masters(zero).items()}, zero.model(x)
    zero.backward(loss_of(zero.model(x)) * torch.nan, last=True)
    ran = []
    zero.step(lambda: ran.append(1))
    assert ran == [1]
    assert all(torch.equal(before[n], v) for n, v in masters(zero).items())
    with torch.no_grad():
        assert torch.equal(zero.model(x), out)
        for piece in zero.pieces.values():
            piece.values.mul_(0)
        zero.pieces["odd"].values.fill_(1.0)
        zero.publish()
        table = start_value("table", (4,))
        torch.testing.assert_close(zero.model(x), (11 + table).expand(BATCH, 4))


def stages_body() -> None:
    mesh = join(Degrees(dp_shard=2))
    plain = Plain()
    expected = reference(plain)
    reference(plain, 0)
    for stage, more in (
        (1, {}),
        (2, {}),
        (3, {"persist": 0}),
        (3, {}),
        (1, {"offload": True}),
        (2, {"offload": True}),
        (3, {"offload": True}),
    ):
        label = f"zero{stage} {more}"
        zero = build(on_meta(Plain), mesh, stage, **more)
        reference(plain, 0)
        compare(assemble(zero, masters(zero)), dict(plain.named_parameters()), label)
        assert torch.equal(zero.model.table, start_value("table", (4,)))
        check_gradients(zero, mesh, plain)
        train(zero, mesh, accum=2)
        compare(assemble(zero, masters(zero)), expected, label)
        check_skip_and_publish(zero, mesh)
        zero.close()
    recompute_body(mesh)
    launch.leave()


class Seen(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def recompute_body(mesh: Mesh) -> None:
    """What DeepSpeed gathers is not seen by a region that backward runs again."""
    zero = build(on_meta(Plain), mesh, 3, persist=0)
    with Seen() as seen, torch.no_grad():
        zero.model(batch(0))
    assert not [op for op in seen.operators if "gather" in str(op)]
    zero.close()
    expected = reference(Plain())
    model = on_meta(Plain)
    remat.apply([model], remat.RematConfig(mode="full"))
    zero = build(model, mesh, 3, persist=0)
    train(zero, mesh, accum=2)
    compare(assemble(zero, masters(zero)), expected, "zero3 × remat")
    zero.close()


def test_every_stage_equals_a_plain_run() -> None:
    ranks.run(stages_body, 2)


def cut_body() -> None:
    from parallel import megatron

    mesh = join(Degrees(dp_shard=2, tp=2))
    hold = Hold(False, megatron.column, megatron.row, megatron.gathered)
    plain = Plain()
    expected = reference(plain)
    for stage in (1, 3):
        model = on_meta(Plain)
        apply(model, mesh.tp, hold)
        zero = build(model, mesh, stage, mpu=megatron.state(mesh), persist=0)
        reference(plain, 0)
        check_gradients(zero, mesh, plain)
        train(zero, mesh, accum=2)
        compare(assemble(zero, masters(zero)), expected, f"zero{stage} × tp2")
        check_skip_and_publish(zero, mesh)
        zero.close()
    experts_body(mesh)
    for sizes in (Degrees(dp_shard=4, ep=2), Degrees(dp_shard=2, tp=2, ep=2)):
        experts_body(join(sizes))
    launch.leave()


def experts_body(mesh: Mesh) -> None:
    plain = Routed()
    expected = reference(plain)
    rank, size = mesh.ep.rank, EXPERTS // mesh.ep.size
    box = Box((EXPERTS, WIDTH, WIDTH), (rank * size, 0, 0), (size, WIDTH, WIDTH))
    for stage, offload in ((1, False), (2, False), (2, True)):
        label = f"zero{stage} × {mesh.sizes}"
        model = on_meta(Routed, mesh.tp, mesh.ep)
        boxes = {"experts": box} if mesh.ep.size > 1 else {}
        zero = build(model, mesh, stage, boxes=boxes, experts=["experts"], offload=offload)
        local = zero.model.get_parameter("experts")
        whole = start_value("experts", box.shape)
        assert torch.equal(local, whole[rank * size : (rank + 1) * size]), label
        reference(plain, 0)
        check_gradients(zero, mesh, plain)
        train(zero, mesh, accum=2)
        compare(assemble(zero, masters(zero)), expected, label)
        zero.close()


def test_tensor_and_expert_parallel_equal_a_plain_run() -> None:
    ranks.run(cut_body, 4)


@pytest.mark.parametrize(
    ("stage", "sizes", "more", "word"),
    [
        (1, Degrees(dp_replicate=2, dp_shard=2), {}, "mesh.dp_shard=4"),
        (3, Degrees(dp_shard=2, ep=2), {}, "engine=zero2"),
        (3, Degrees(dp_shard=2, tp=2), {"experts": True}, "engine=zero2"),
        (3, Degrees(), {"compiled": True}, "engine=zero2"),
        (2, Degrees(dp_shard=2), {"deterministic": True}, "engine=fsdp2"),
    ],
)
def test_what_cannot_work_is_refused_before_any_rank(
    stage: int, sizes: Degrees, more: dict[str, bool], word: str
) -> None:
    with pytest.raises(LayoutError, match=word):
        check(stage, sizes, **more)
