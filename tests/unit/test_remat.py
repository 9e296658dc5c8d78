"""Recomputation and compilation change neither gradients nor routing."""

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import launch, remat
from parallel.remat import RematConfig
from pretrain.models.build import ModelConfig, build
from pretrain.models.init import initialise
from pretrain.models.moe import moe_layers
from tests import ranks, tiny

Mode = Literal["full", "selective"]
SHAPE = {"input_size": 8, "in_channels": 16, "num_classes": 10, "learn_sigma": False}
TOPK = torch.ops.aten.topk.default
MATMUL = torch.ops.aten.addmm.default


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()
    torch.set_num_threads(before)


def make(name: str, mode: Literal["none", "full", "selective"] = "none", every: int = 1) -> Any:
    cfg = TypeAdapter(ModelConfig).validate_python(tiny.MODELS[name] | SHAPE)
    with torch.device("meta"):
        model = build(cfg)
    model.to_empty(device="cpu")
    initialise(model, 0, 0.05)
    remat.apply(model.units(), RematConfig(mode=mode, every=every))
    return model.train()


def loss_of(model: nn.Module) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(4, 16, 8, 8, generator=draws)
    t = torch.rand(4, generator=draws) * 1000
    labels = torch.randint(0, 11, (4,), generator=draws)
    pred, routings = model(x, t, labels, routing=True)
    extra = sum(routing.z.sum() + routing.probs.square().sum() for routing in routings)
    return pred.square().sum() + extra


def gradients(model: nn.Module) -> dict[str, Tensor]:
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "udit" else ()) for n in tiny.MODELS]
)
@pytest.mark.parametrize(("mode", "every"), [("full", 1), ("selective", 1), ("full", 2)])
def test_gradients_are_the_same_bits_and_routing_is_taken_once(
    name: str, mode: Mode, every: int
) -> None:
    expected, model = gradients(make(name)), make(name, mode, every)
    plain, calls = Calls(), Calls()
    with plain:
        gradients(make(name))
    with calls:
        got = gradients(model)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert calls.seen[TOPK] == len(moe_layers(model))
    again = calls.seen[MATMUL] - plain.seen[MATMUL]
    assert again == 0 if mode == "selective" else again > 0


@pytest.mark.parametrize("name", ["dit-moe", "udit-moe"])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_top_k_that_would_flip_does_not_reach_the_gradients(
    name: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients(make(name))
    honest, calls = Tensor.topk, [0]
    layers = len(moe_layers(make(name)))

    def flipping(x: Tensor, k: int, dim: int = -1) -> Any:
        calls[0] += 1
        return honest(x, k, dim, largest=calls[0] <= layers)

    monkeypatch.setattr(Tensor, "topk", flipping)
    got = gradients(make(name, mode))
    assert calls[0] > layers, "backward has run the router again, with a top-k that would flip"
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def kept(model: nn.Module) -> int:
    """Bytes that autograd holds for backward, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of(model)
    del loss
    return sum(held.values())


@pytest.mark.parametrize("name", tiny.MODELS)
def test_less_is_kept_for_backward(name: str) -> None:
    everything, half, least = (
        kept(make(name)),
        kept(make(name, "full", 2)),
        kept(make(name, "full")),
    )
    assert least < half < everything
    assert least < 0.5 * everything


def test_names_stay_and_no_unit_is_touched_without_a_mode() -> None:
    plain, full = make("udit-moe"), make("udit-moe", "full")
    assert list(plain.state_dict()) == list(full.state_dict())
    assert not any("forward" in vars(unit) for unit in plain.units())
    assert all("forward" in vars(unit) for unit in full.units())


class Exchange(nn.Module):
    """A linear layer around an all-to-all whose split sizes depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x).sin()
        first = (x[:, :2].detach().topk(1).indices.flatten() == 0).sum()
        counts = torch.stack([first, len(x) - first])
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)  # writes into what it is given
        sent, got = counts.tolist(), theirs.tolist()
        away = funcol.all_to_all_single_autograd(x, got, sent, dist.group.WORLD)
        home = funcol.all_to_all_single_autograd(
            self.outer(away.cos()), sent, got, dist.group.WORLD
        )
        return x + home.sin()


def exchanges() -> None:
    """Gradients under fully_shard are equal in every mode."""
    place = launch.Place.here()
    launch.join(place, threads=1, timeout=timedelta(seconds=60))
    found: dict[str, list[Tensor]] = {}
    for mode in ("none", "full", "selective"):
        torch.manual_seed(0)
        model = nn.Sequential(Exchange(), Exchange())
        remat.apply(list(model), RematConfig.model_validate({"mode": mode}))
        for unit in (*model, model):
            fully_shard(unit, mesh=init_device_mesh("cpu", (2,)))
        for shard in [m for m in model.modules() if hasattr(m, "set_gradient_divide_factor")]:
            shard.set_force_sum_reduction_for_comms(True)
            shard.set_gradient_divide_factor(1.0)
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(place.rank))
        model(x).square().sum().backward()
        found[mode] = [p.grad.to_local() for p in model.parameters()]
    for mode in ("full", "selective"):
        for got, expected in zip(found[mode], found["none"], strict=True):
            assert torch.equal(got, expected), mode
    launch.leave()


def test_an_exchange_with_sizes_from_the_data_is_recomputed_on_all_ranks() -> None:
    ranks.run(exchanges, 2)


def counting(seen: Counter[str]) -> Callable[..., Any]:
    """A backend that runs graphs as they are and counts the top-k in forward's and backward's."""

    def compiler(which: str, graph: torch.fx.GraphModule, _inputs: object) -> Any:
        seen[which] += 1
        seen[f"{which} topk"] += sum(node.target is TOPK for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    return aot_autograd(
        fw_compiler=partial(compiler, "forward"),
        bw_compiler=partial(compiler, "backward"),
        partition_fn=min_cut_rematerialization_partition,
    )


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_compiled_units_share_graphs_and_route_in_forward_only(
    mode: Literal["none", "full", "selective"],
) -> None:
    expected, seen = gradients(make("dit-moe")), Counter[str]()
    model = make("dit-moe", mode)
    remat.compile_units(model.units(), backend=counting(seen))
    got = gradients(model)
    assert all(close(got[key], expected[key]) for key in expected)
    assert seen == {"forward": 1, "forward topk": 1, "backward": 1, "backward topk": 0}


def close(got: Tensor, expected: Tensor) -> bool:
    # why: the key bias has gradient 0, so all of it is rounding.
    return bool((got - expected).norm() <= 1e-6 * expected.norm().clamp(min=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_compiled_dit_equals_the_eager_one(mode: Literal["none", "selective"]) -> None:
    expected, model = gradients(make("dit")), make("dit", mode)
    remat.compile_units(model.units())
    got = gradients(model)
    assert all(close(got[key], expected[key]) for key in expected)


def test_one_graph_more_than_expected_raises() -> None:
    model = make("dit")
    remat.compile_units(model.units(), graphs=1, backend="eager")
    loss_of(model)
    with pytest.raises(FailOnRecompileLimitHit), torch.no_grad():
        loss_of(model)


def test_kinds_are_counted_once() -> None:
    remat.compile_units(make("udit-moe").units(), graphs=2, backend="eager")
    # the two last stages differ in their resolution alone
    assert torch._dynamo.config.recompile_limit == 2 * 4
    remat.compile_units(make("dit").units(), graphs=2, backend="eager")
    assert torch._dynamo.config.recompile_limit == 2 * 1
