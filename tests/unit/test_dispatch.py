"""The way of tokens to experts and back, on 1, 2 and 4 ranks, against a loop in float64."""

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from parallel import launch, remat
from parallel.dispatch import Dispatcher, Exact, Static
from parallel.experts import Picks, grouped_mm
from parallel.kernels import native
from parallel.mesh import Degrees, Mesh
from pretrain.models.init import initialise
from pretrain.models.layers import SwiGLU
from pretrain.models.moe import MoE, MoEConfig
from tests import ranks

RematMode = Literal["none", "full", "selective"]
TOKENS, WIDTH, HIDDEN, EXPERTS = 64, 8, 12, 8
LAYOUTS = [
    [Degrees()],
    [Degrees(dp_shard=2, ep=2), Degrees(tp=2, ep=2), Degrees(tp=2)],
    [Degrees(dp_shard=4, ep=2), Degrees(dp_shard=2, tp=2, ep=4)],
    pytest.param(
        [
            Degrees(dp_shard=4, ep=4),
            Degrees(dp_shard=2, tp=2, ep=2),
            Degrees(dp_shard=2, tp=2),
        ],
        marks=pytest.mark.slow,
    ),
]


@dataclass
class Values:
    """The leaves of one layer, and what comes out and back."""

    x: Tensor  # (T, D)
    weights: Tensor  # (P,)
    gate: Tensor  # (E, H, D)
    up: Tensor
    down: Tensor  # (E, D, H)
    out: Tensor | None = None
    dropped: Tensor | None = None

    def leaves(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("x", "weights", "gate", "up", "down")}


def draw(num_picks: int) -> tuple[Values, Tensor]:
    """Leaves in float64, and the gradient of the output."""
    generator = torch.Generator().manual_seed(7)
    shapes = [
        (TOKENS, WIDTH),
        (num_picks,),
        (EXPERTS, HIDDEN, WIDTH),
        (EXPERTS, HIDDEN, WIDTH),
        (EXPERTS, WIDTH, HIDDEN),
        (TOKENS, WIDTH),
    ]
    *leaves, grad = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return Values(*leaves), grad


def routing(case: str) -> list[list[int]]:
    """The experts of each token."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    if case == "one":
        return [[5]] * TOKENS
    if case == "varied":  # many for the first, none for the middle; expert 2 gets nothing
        wanted = scores[: TOKENS // 2] > torch.linspace(0, 1.5, TOKENS // 2)[:, None]
        wanted[:, 2] = False
        half = [row.nonzero().flatten().tolist() for row in wanted]
        return half + half[::-1]
    if case == "crowded":  # most want experts 0 to 2
        scores[:, :3] += 0.6
    return scores.topk(2).indices.tolist()


def picks_of(chosen: list[list[int]], weights: Tensor, *, varied: bool) -> Picks:
    experts = torch.tensor([e for row in chosen for e in row])
    tokens = torch.tensor([t for t, row in enumerate(chosen) for _ in row])
    lengths = torch.tensor([len(row) for row in chosen])
    return Picks(experts, weights, tokens, lengths if varied else len(chosen[0]))


@functools.cache
def loop(case: str, lost: frozenset[int]) -> Values:
    """Every pick by itself; those in `lost`, by their number, are left out."""
    chosen = routing(case)
    values, grad = draw(sum(map(len, chosen)))
    v = Values(*(leaf.clone().requires_grad_() for leaf in values.leaves().values()))
    out, pick = [], 0
    for token, row in zip(v.x, chosen, strict=True):
        y = token * 3  # beside
        for e in row:
            if pick not in lost:
                hidden = F.silu(v.gate[e] @ token) * (v.up[e] @ token)
                y = y + v.weights[pick] * (v.down[e] @ hidden)
            pick += 1
        out.append(y)
    v.out = torch.stack(out)
    v.out.backward(grad)
    return v


def through(
    make: Callable[[], Dispatcher], values: Values, picks: Picks, grad: Tensor, fault: float
) -> Values:
    """The same by a dispatcher, in float32. values: what this rank holds."""
    v = Values(*(leaf.float().requires_grad_() for leaf in values.leaves().values()))

    def experts(rows: Tensor, counts: Tensor) -> Tensor:
        hidden = F.silu(grouped_mm(rows, v.gate, counts)) * grouped_mm(rows, v.up, counts)
        return fault * grouped_mm(hidden, v.down, counts)

    out, side, dropped = make()(v.x, picks._replace(weights=v.weights), experts, lambda: v.x * 3)
    assert side is not None
    v.out = out + side
    v.out.backward(grad.float())
    v.dropped = dropped
    return v


def lost_picks(chosen: list[list[int]], senders: int, ep: int, room: int) -> set[int]:
    """The picks that do not fit, counted by hand."""
    lost, first, local = set(), 0, EXPERTS // ep
    for sender in range(senders):
        rows = chosen[sender * TOKENS // senders : (sender + 1) * TOKENS // senders]
        flat = [e for row in rows for e in row]
        for rank in range(ep):
            of = [[p for p, e in enumerate(flat) if e == rank * local + j] for j in range(local)]
            total, seen, end = sum(map(len, of)), 0, 0
            for numbers in of:
                seen += len(numbers)
                fit = seen * min(total, room) // max(total, 1) - end
                end += fit
                lost |= {first + p for p in numbers[fit:]}
            assert end == min(total, room)
        first += len(flat)
    return lost


def error(got: Tensor, want: Tensor) -> float:
    if not want.any():
        return float(got.abs().max()) if got.numel() else 0.0
    return float((got.double() - want).norm() / want.norm())


def errors(got: Values, want: Values, tokens: slice, picks: slice, experts: slice) -> list[float]:
    """‖a−b‖/‖b‖ of the output, of the gradients of x and the weights, and of each expert's."""
    assert got.out is not None
    assert want.out is not None
    found = [
        error(got.out.detach(), want.out.detach()[tokens]),
        error(got.x.grad, want.x.grad[tokens]),
        error(got.weights.grad, want.weights.grad[picks]),
    ]
    for name in ("gate", "up", "down"):
        pairs = zip(getattr(got, name).grad, getattr(want, name).grad[experts], strict=True)
        found += [error(a, b) for a, b in pairs]
    return found


def run_case(mesh: Mesh, case: str, make: str, capacity: float, fault: float = 1.0) -> None:
    """One case on this rank; everything equals the loop, unless there is a fault."""
    ep, data = mesh.ep, mesh.data
    chosen = routing(case)
    starts = [0]
    for row in chosen:
        starts.append(starts[-1] + len(row))
    whole, grad = draw(starts[-1])
    share = TOKENS // data.size
    tokens = slice(data.rank * share, (data.rank + 1) * share)
    numbers = slice(starts[tokens.start], starts[tokens.stop])
    local = EXPERTS // ep.size
    mine = slice(ep.rank * local, (ep.rank + 1) * local)
    held = Values(
        whole.x[tokens], whole.weights[numbers], whole.gate[mine], whole.up[mine], whole.down[mine]
    )
    picks = picks_of(chosen[tokens], held.weights, varied=case == "varied")
    static = Static(EXPERTS, capacity, ep, mesh.tp)
    lost: set[int] = set()
    if make == "static" and ep.size > 1:
        senders = data.size * mesh.tp.size
        most = starts[-1] // (data.size if case == "varied" else senders)
        room = static.room(starts[-1] // senders, most)
        lost = lost_picks(chosen, senders, ep.size, room)
        assert capacity < EXPERTS or not lost
    got = through(
        lambda: static if make == "static" else Exact(EXPERTS, ep, mesh.tp),
        held,
        picks,
        grad[tokens],
        fault if ep.rank == ep.size - 1 else 1.0,
    )
    for name in ("gate", "up", "down"):
        dist.all_reduce(getattr(got, name).grad, group=mesh.experts.get_group())
    assert got.dropped.item() == len(lost & set(range(numbers.start, numbers.stop))), (case, make)
    worst = max(errors(got, loop(case, frozenset(lost)), tokens, numbers, mine))
    everywhere = torch.tensor(worst)
    dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    where = f"{mesh.sizes} {case} {make} {capacity} fault {fault}: {everywhere.item():.1e}"
    assert (everywhere <= 1e-6) if fault == 1 else (everywhere > 1e-2), where


def layer_case(mesh: Mesh, cfg: MoEConfig) -> None:
    """A whole layer, with its router, equals the same layer on one rank."""
    generator = torch.Generator().manual_seed(5)
    x, normed = torch.randn(2, 4, TOKENS // 4, WIDTH, generator=generator)
    time = torch.randn(4, WIDTH, generator=generator)
    grad = torch.randn(x.shape, generator=generator)
    whole = MoE(WIDTH, cfg, SwiGLU(WIDTH, HIDDEN))
    initialise(whole, 0, zero_std=0.5)
    part = copy.deepcopy(whole)
    local = EXPERTS // mesh.ep.size
    mine = slice(mesh.ep.rank * local, (mesh.ep.rank + 1) * local)
    for name in ("gate", "up", "down"):
        held = getattr(whole.experts, name).detach()[mine].clone()
        setattr(part.experts, name, nn.Parameter(held))
    if cfg.dispatcher == "static":
        part.dispatcher = Static(EXPERTS, cfg.capacity, mesh.ep, mesh.tp)
    else:
        part.dispatcher = Exact(EXPERTS, mesh.ep, mesh.tp)
    share = 4 // mesh.data.size
    images = slice(mesh.data.rank * share, (mesh.data.rank + 1) * share)

    want, _ = whole(x, normed, time)
    want.backward(grad)
    got, routing = part(x[images], normed[images], time[images])
    got.backward(grad[images])
    assert routing.dropped == 0
    found = {"out": error(got.detach(), want.detach()[images].double())}
    for (name, a), b in zip(part.named_parameters(), whole.parameters(), strict=True):
        if name.startswith("experts."):
            dist.all_reduce(a.grad, group=mesh.experts.get_group())
        else:  # equal on the ranks of the tensor axis
            dist.all_reduce(a.grad)
            a.grad /= mesh.tp.size
        wanted = b.grad[mine] if name.startswith("experts.") else b.grad
        found[name] = error(a.grad, wanted.double())
    assert max(found.values()) <= 2e-6, (mesh.sizes, cfg, found)


def compiled_case(sizes: Degrees, mode: RematMode, balance: str) -> None:
    """One graph with gradients and one without give eager's bits, whatever goes where."""
    native.library = lambda: None  # type: ignore[assignment]  # C rounds otherwise
    launch.join(launch.Place.here(), threads=1, timeout=timedelta(seconds=60))
    mesh = Mesh(sizes, "cpu")
    local = EXPERTS // mesh.ep.size
    mine = slice(mesh.ep.rank * local, (mesh.ep.rank + 1) * local)
    layers = []
    for _ in range(2):
        made = {"experts": EXPERTS, "hidden": HIDDEN, "balance": balance}
        layer = MoE(WIDTH, MoEConfig.model_validate(made), SwiGLU(WIDTH, HIDDEN))
        initialise(layer, 0, zero_std=0.5)
        for name in ("gate", "up", "down"):
            held = getattr(layer.experts, name).detach()[mine].clone()
            setattr(layer.experts, name, nn.Parameter(held))
        layer.dispatcher = Exact(EXPERTS, mesh.ep, mesh.tp)
        remat.apply([layer], remat.RematConfig(mode=mode))
        layers.append(layer)
    remat.compile_units(layers[1:], backend="aot_eager")

    generator = torch.Generator().manual_seed(mesh.data.rank)
    # Experts that all tokens want: none in particular; of one rank, so that another gets no row; of
    # this rank, so that none sends one.
    for wanted in ([], [0, 1], [EXPERTS - 2, EXPERTS - 1], [*range(EXPERTS)[mine]], []):
        x, normed, grad = torch.randn(3, 2, TOKENS // 4, WIDTH, generator=generator)
        time = torch.randn(2, WIDTH, generator=generator)
        found = []
        for layer in layers:
            layer.router.bias.zero_()[wanted] = 100.0
            layer.zero_grad()
            tokens = x.clone().requires_grad_()
            out, _ = layer(tokens, normed, time)
            out.backward(grad)
            found.append([out.detach(), tokens.grad, *(p.grad for p in layer.parameters())])
        with torch.no_grad():
            found[1].append(layers[1](x, normed, time)[0])
            found[0].append(found[0][0])
        assert all(map(torch.equal, *found)), wanted
    assert counters["stats"]["unique_graphs"] == 2
    launch.leave()


@pytest.mark.parametrize(
    ("sizes", "mode", "balance"),
    [
        (Degrees(dp_shard=2, ep=2), "none", "bias"),
        pytest.param(Degrees(dp_shard=2, ep=2), "full", "bias", marks=pytest.mark.slow),
        pytest.param(Degrees(tp=2, ep=2), "selective", "bias", marks=pytest.mark.slow),
        pytest.param(Degrees(tp=2, ep=2), "none", "expert_choice", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_layer_has_one_graph_for_all_sizes_also_for_none(
    sizes: Degrees, mode: RematMode, balance: str
) -> None:
    ranks.run(compiled_case, sizes.world, sizes, mode, balance)


def only_exact_waits(mesh: Mesh) -> None:
    """On tensors without values nothing can be read; what is recorded is the whole way."""
    for case in ("ordinary", "varied"):
        chosen = routing(case)
        values, grad = draw(sum(map(len, chosen)))
        picks = picks_of(chosen, values.weights, varied=case == "varied")
        mode = FakeTensorMode(allow_non_fake_inputs=False)
        leaves = {name: mode.from_tensor(leaf) for name, leaf in values.leaves().items()}
        leaves |= {n: leaves[n][: EXPERTS // mesh.ep.size] for n in ("gate", "up", "down")}
        blank = [v if isinstance(v, int) else mode.from_tensor(v) for v in picks]
        with mode:
            args = Values(**leaves), Picks(*blank), mode.from_tensor(grad), 1.0
            through(lambda: Static(EXPERTS, 2.0, mesh.ep, mesh.tp), *args)
            with pytest.raises(DataDependentOutputException):
                through(lambda: Exact(EXPERTS, mesh.ep, mesh.tp), *args)


def cases_on(layouts: list[Degrees]) -> None:
    launch.join(launch.Place.here(), threads=1, timeout=timedelta(seconds=60))
    for sizes in layouts:
        mesh = Mesh(sizes, "cpu")
        for case in ("ordinary", "one", "varied", "crowded"):
            run_case(mesh, case, "exact", 1.0)
        for case in ("ordinary", "one", "varied", "crowded"):
            if case != "varied" or sizes.data <= 2:  # its halves, not its quarters, are even
                run_case(mesh, case, "static", 1e9)
                run_case(mesh, case, "static", 1.0)
        run_case(mesh, "ordinary", "exact", 1.0, fault=2.0)
        run_case(mesh, "ordinary", "static", 2.0, fault=2.0)
        for balance, dispatcher in itertools.product(
            ("bias", "expert_choice"), ("exact", "static")
        ):
            made = {"balance": balance, "dispatcher": dispatcher, "capacity": EXPERTS}
            layer_case(mesh, MoEConfig.model_validate({"experts": EXPERTS, "hidden": 12, **made}))
        if sizes.ep > 1:
            only_exact_waits(mesh)
    launch.leave()


@pytest.mark.parametrize("layouts", LAYOUTS, ids=["1", "2", "4", "more of 4"])
def test_every_expert_gets_the_gradients_of_a_loop(layouts: list[Degrees]) -> None:
    ranks.run(cases_on, layouts[0].world, layouts)
