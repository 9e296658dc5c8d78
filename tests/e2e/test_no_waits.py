"""A plain step never waits for the device: what would is forbidden, or counted, over 50 steps."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests import ranks, tiny

PLAIN = range(4, 54)  # steps done before a plain step: past the start, before the end
SETTLE = "what the step before decided, from its asynchronous copy"
SIZES = "sizes of what an MoE layer exchanges"
# Calls that need a value on the host, and so wait where it is made on a GPU.
WAITING = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu")
KNOWN = {("engine.py", "settle"): SETTLE, ("dispatch.py", "__call__"): SIZES}


class _Operators(TorchDispatchMode):
    def __init__(self, seen: Counter[str], now: list[int]) -> None:
        super().__init__()
        self._seen, self._now = seen, now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero") and self._now[0] in PLAIN:
            self._seen[name] += 1
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, seen: Counter[str], now: list[int]) -> None:
        super().__init__()
        self._seen, self._now = seen, now

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in (*WAITING, "nonzero") and self._now[0] in PLAIN:
            code = sys._getframe(1).f_code
            self._seen[KNOWN.get((Path(code.co_filename).name, code.co_name), name)] += 1
        return func(*args, **(kwargs or {}))


def _watched(path: Path) -> None:
    """Trains on this rank; rank 0 prints what waited."""
    from pretrain import config
    from pretrain import train as page
    from pretrain.engine import Engine

    seen: Counter[str] = Counter()
    now = [-1]
    step = Engine.step

    def counted(self: Engine, *args: Any, **kwargs: Any) -> Any:
        now[0] = self._state.step
        return step(self, *args, **kwargs)

    Engine.step = counted  # type: ignore[method-assign]
    with _Operators(seen, now), _Calls(seen, now):
        page.train(config.load(path, []))
    if os.environ["RANK"] == "0":
        print("waits", json.dumps(seen))


def waits(folder: Path, data: Path, world: int, model: str, **changes: Any) -> dict[str, int]:
    common = {"steps": PLAIN.stop + 2, "log__every": 1000, "checkpoint__every": 1000}
    path = tiny.write(folder, model, data, **common, **changes)
    ranks.run(_watched, world, path, log=folder / "log")
    line = next(n for n in (folder / "log").read_text().splitlines() if n.startswith("waits "))
    return json.loads(line.removeprefix("waits "))


@pytest.mark.parametrize(
    ("world", "model", "changes"),
    [
        (1, "dit-moe", {}),
        (2, "dit-moe", {"mesh__ep": 2, "model__moe__dispatcher": "static"}),
        pytest.param(2, "udit-moe", {"accum": 2}, marks=pytest.mark.slow),
        pytest.param(1, "dit", {"precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param(2, "udit", {"mesh__tp": 2}, marks=pytest.mark.slow),
    ],
)
def test_plain_steps_wait_for_nothing(
    tmp_path: Path, digits: Path, world: int, model: str, changes: dict[str, Any]
) -> None:
    assert waits(tmp_path, digits, world, model, **changes) == {SETTLE: len(PLAIN)}


def test_exact_dispatch_copies_its_sizes_once_a_layer(tmp_path: Path, digits: Path) -> None:
    layers = tiny.MODELS["dit-moe"]["depth"]
    found = waits(tmp_path, digits, 2, "dit-moe", mesh__ep=2)
    assert found == {SETTLE: len(PLAIN), SIZES: layers * len(PLAIN)}


def test_a_wait_is_seen() -> None:
    seen: Counter[str] = Counter()
    x = torch.ones(3)
    with _Operators(seen, [10]), _Calls(seen, [10]):
        float(x.sum())
        x.nonzero()
    assert seen["_local_scalar_dense"] == 1
    assert seen["__float__"] == 1
    assert seen["nonzero"] == 2  # as a call and as an operator


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_plain_steps_wait_for_nothing_on_a_gpu(
    tmp_path: Path, digits: Path, compiled: bool
) -> None:
    common = {"steps": PLAIN.stop + 2, "log__every": 1000, "checkpoint__every": 1000}
    path = tiny.write(tmp_path, "udit-moe", digits, precision="bf16", compile=compiled, **common)
    ranks.run(_forbidden, 1, path, log=tmp_path / "log")


def _forbidden(path: Path) -> None:
    from pretrain import config
    from pretrain import train as page
    from pretrain.engine import Engine

    step = Engine.step

    def strict(self: Engine, *args: Any, **kwargs: Any) -> Any:
        mode = "error" if self._state.step in PLAIN else "default"
        torch.cuda.set_sync_debug_mode(mode)
        return step(self, *args, **kwargs)

    Engine.step = strict  # type: ignore[method-assign]
    page.train(config.load(path, []))
