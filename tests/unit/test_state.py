"""A state that starts anew is the state of a run that has not begun, on every layout."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from data_pipeline.cursor import Cursor
from parallel import launch
from parallel.mesh import Mesh, MeshConfig, degrees
from parallel.shards import Piece
from pretrain.ema import EMAConfig
from pretrain.guard import GuardConfig
from pretrain.models.build import ModelConfig
from pretrain.optim import OptimConfig
from pretrain.parallelize import Compute, EngineName, parallelize
from pretrain.state import TrainState
from tests import ranks, tiny


def values(state: TrainState) -> dict[str, Tensor]:
    return {
        name: (tensor.values if isinstance(tensor, Piece) else tensor).clone()
        for name, tensor in state.tensors().items()
    }


def restarts(model_name: str, engine: EngineName, layout: dict[str, Any]) -> None:
    place = launch.Place.here()
    device = launch.join(place, threads=1, timeout=timedelta(seconds=60))
    tree: dict[str, Any] = tiny.MODELS[model_name] | {"input_size": 8, "in_channels": 16}
    # why: under muP, so that the starts are not those that the layers declare.
    tree |= {"num_classes": 10, "mup": {"base_width": tree["width"] // 2}}
    cfg = TypeAdapter(ModelConfig).validate_python(tree)
    cut = MeshConfig(**layout)
    backend = parallelize(
        cfg,
        cut,
        Mesh(degrees(cut, place.world), device.type),
        Compute(engine),
        seed=3,
        device=device,
    )
    ema = EMAConfig(half_lives=(9,), power=(0.1,))
    state = TrainState.new(backend, OptimConfig(), ema, GuardConfig(), seed=3)
    model, inputs = backend.model, (torch.ones(2, 16, 8, 8), torch.ones(2), torch.ones(2).long())
    with torch.no_grad():
        before, output = values(state), model(*inputs)
        for tensor in state.tensors().values():
            (tensor.values if isinstance(tensor, Piece) else tensor).add_(1.0)
        state.loaded(state.scalars() | {"step": 7, "position": 56, "passed_over": [[8, 16]]})
        assert state.cursor == Cursor(56, ((8, 16),))
        assert state.scalars()["passed_over"] == [[8, 16]]
        assert not torch.equal(model(*inputs), output)
        state.restart()
        after = values(state)
        assert {n for n in before if not torch.equal(before[n], after[n])} == set()
        assert torch.equal(model(*inputs), output)
    assert (state.step, state.cursor) == (0, Cursor())
    parts = ("model", "optim", "guard", *ema.names)
    assert all(any(name.startswith(f"{part}.") for name in after) for part in parts)
    launch.leave()


@pytest.mark.parametrize(
    ("model", "engine", "world", "layout"),
    [
        ("dit-moe", "fsdp2", 3, {"dp_replicate": 3}),
        ("udit-moe", "fsdp2", 4, {"tp": 2, "ep": 2}),
        ("dit-moe", "zero1", 2, {"ep": 2}),
        ("dit-moe", "zero3", 2, {}),
    ],
)
def test_a_restart_is_the_start(
    model: str, engine: str, world: int, layout: dict[str, Any]
) -> None:
    ranks.run(restarts, world, model, engine, layout)
