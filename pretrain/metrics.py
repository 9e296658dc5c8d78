"""Where the numbers of a run go: metrics.jsonl, log.txt, the console and wandb.

Knows no model and no mesh: it is handed numbers. Every rank calls it alike; only rank 0 has places
to write to. Also here: summaries of the expert load of MoE.

    with Log(cfg.log, run_dir, rank=rank, steps=cfg.steps, start=state.step) as log:
        log.train(step, {"loss": loss, "lr": lr})
"""

import atexit
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from pretrain.lines import Lines, cut

Pick = Callable[[list[float]], float]
WandbMode = Literal["offline", "online", "disabled"]

METRICS = "metrics.jsonl"
TEXT = "log.txt"
SHOWN = {  # of a record on the console, in this order
    "loss": ".4f",
    "grad_norm": ".3f",
    "lr": ".2e",
    "images_per_s": ".1f",
    "mfu": ".3f",
    "moe.load_max": ".2f",
    "moe.dropped": ".0f",
    "skipped": ".0f",
}


class LogError(ValueError):
    """A place to log to that was asked for cannot be had."""


class LogConfig(BaseModel):
    """How often and where to report."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
    every: int = Field(10, ge=1)  # steps between records; each waits once for the device
    wandb: WandbMode = "offline"  # the variable WANDB_MODE goes before it
    wandb_project: str = "dit-pretrain"  # wandb project
    time_bins: int = Field(4, ge=1)  # timestep bins of the MoE load
    sample_ids: bool = False  # every sample of every step, in RUN/seen (pretrain/seen.py)


class _Sink:
    """A place to write to; what it has no use for, it leaves."""

    def record(self, step: int, values: Mapping[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def tick(self, step: int) -> None: ...
    def rewind(self, step: int) -> None: ...
    def picture(self, step: int, name: str, path: Path) -> None: ...
    def close(self) -> None: ...


class Log:
    """All places at once. On ranks other than 0 there are none, and every call does nothing."""

    def __init__(
        self,
        cfg: LogConfig,
        run_dir: str | Path,
        *,
        rank: int,
        steps: int,
        start: int = 0,
        name: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens the places and cuts metrics.jsonl back to `start`, the restored step.

        steps: length of the run. name: of the run, its folder's unless given. settings: the whole
        configuration, for wandb. Raises LogError if wandb cannot start.
        """
        self._sinks: list[_Sink] = []
        if rank != 0:
            return
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        mode = _wandb_mode(cfg)
        if mode != "disabled":
            self._sinks.append(_Wandb(mode, cfg.wandb_project, name, folder, dict(settings or {})))
        cut(folder / METRICS, start)
        self._sinks += [_Lines(folder / METRICS), _Text(folder), _console(steps, start)]

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """One record. Values are numbers, arrays, tensors, strings, or lists and dicts of them."""
        if not self._sinks:
            return
        # sync: tensors are copied to the host here, and nowhere else in this module.
        record = {key: plain(value) for key, value in values.items()}
        for sink in self._sinks:
            sink.record(step, record)

    def say(self, text: str) -> None:
        """A sentence for people: console and log.txt."""
        for sink in self._sinks:
            sink.say(text)

    def tick(self, step: int) -> None:
        """Moves the progress bar; costs nothing and waits for nothing."""
        for sink in self._sinks:
            sink.tick(step)

    def rewind(self, step: int) -> None:
        """The run goes on from this earlier step: metrics.jsonl is cut back to it."""
        for sink in self._sinks:
            sink.rewind(step)

    def picture(self, step: int, name: str, path: str | Path) -> None:
        """A picture file that was written."""
        for sink in self._sinks:
            sink.picture(step, name, Path(path))

    def close(self) -> None:
        """Safe to call twice."""
        while self._sinks:
            self._sinks.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def moe_load(counts: Tensor) -> dict[str, Any]:
    """How evenly experts are used. counts: (L, bins, E) picks of layer, timestep bin and expert.

    Per layer: load_max, the largest expert's share times E (1 = even, E = one has all);
    load_entropy in 0..1 (1 = even); dead, experts without a pick; and the first two by timestep
    bin, None where a bin is empty. Totals are those of the worst layer; `dead` is the sum.
    """
    table = counts.detach().double().cpu().numpy()
    layers = [_layer_load(layer) for layer in table]
    return {
        "moe.load_max": _worst((layer["load_max"] for layer in layers), max),
        "moe.load_entropy": _worst((layer["load_entropy"] for layer in layers), min),
        "moe.dead": sum(layer["dead"] for layer in layers),
        "moe.load_max_by_time": _worst_by_time(layers, "load_max_by_time", max),
        "moe.load_entropy_by_time": _worst_by_time(layers, "load_entropy_by_time", min),
        "moe.layers": layers,
    }


def _layer_load(table: np.ndarray) -> dict[str, Any]:
    """table: (bins, E)."""
    total = table.sum(axis=0)
    return {
        "load_max": _load_max(total),
        "load_entropy": _load_entropy(total),
        "dead": int((total == 0).sum()),
        "load_max_by_time": [_load_max(row) for row in table],
        "load_entropy_by_time": [_load_entropy(row) for row in table],
    }


def _load_max(picks: np.ndarray) -> float | None:
    return float(picks.max() * len(picks) / picks.sum()) if picks.any() else None


def _load_entropy(picks: np.ndarray) -> float | None:
    if not picks.any():
        return None
    share = picks[picks > 0] / picks.sum()
    return float(-(share * np.log(share)).sum() / math.log(len(picks))) if len(picks) > 1 else 1.0


def _worst(values: Iterable[float | None], pick: Pick) -> float | None:
    known = [value for value in values if value is not None]
    return pick(known) if known else None


def _worst_by_time(layers: list[dict[str, Any]], key: str, pick: Pick) -> list[float | None]:
    bins = zip(*(layer[key] for layer in layers), strict=True)
    return [_worst(of_a_bin, pick) for of_a_bin in bins]


def plain(value: Any) -> Any:
    """What JSON can hold, at full precision; a number that is not finite becomes None."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().tolist()
    elif isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """wandb draws numbers only: {"a": {"b": [1]}} -> ("a.b.0", 1)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat({f"{key}.{inner}": item for inner, item in value.items()})
        elif isinstance(value, list):
            yield from _flat({f"{key}.{i}": item for i, item in enumerate(value)})
        elif value is not None:
            yield key, value


def _shown(values: Mapping[str, Any]) -> str:
    """The line of a record; a loss or norm of None was not finite, of others nothing is known."""
    parts = []
    for key, form in SHOWN.items():
        value = values.get(key)
        if value is not None:
            parts.append(f"{key} {value:{form}}")
        elif key in values and key in ("loss", "grad_norm"):
            parts.append(f"{key} not finite")
    return "  ".join(parts)


class _Lines(_Sink):
    """metrics.jsonl: one object a record."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        self._lines.append(step, values)

    def rewind(self, step: int) -> None:
        self._lines.rewind(step)

    def close(self) -> None:
        self._lines.close()


class _Text(_Sink):
    """log.txt: what the console said, each line with the time of day."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / TEXT).open("a", encoding="utf-8")

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        self.say(f"step {step}  {_shown(values)}")

    def say(self, text: str) -> None:
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        self._file.write(f"{now}  {text}\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Plain(_Sink):
    """Standard output without a terminal: a line a record."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        self.say(f"step {step}/{self._steps}  {_shown(values)}")

    def say(self, text: str) -> None:
        print(text, flush=True)


class _Bar(_Sink):
    """A terminal: one progress bar with the last record beside it."""

    def __init__(self, steps: int, start: int) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}", markup=False),
        )
        self._task = self._progress.add_task("train", total=steps, completed=start, last="")
        self._progress.start()
        # why: a run that ends by an error would leave the terminal without its cursor.
        atexit.register(self._progress.stop)

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        self._progress.update(self._task, completed=step, last=_shown(values))

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def tick(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def rewind(self, step: int) -> None:
        self.tick(step)

    def close(self) -> None:
        self._progress.stop()
        atexit.unregister(self._progress.stop)


def _console(steps: int, start: int) -> _Sink:
    return _Bar(steps, start) if sys.stdout.isatty() else _Plain(steps)


class _Wandb(_Sink):
    """A wandb run in the run directory; a resumed run goes on under the same id."""

    def __init__(
        self,
        mode: WandbMode,
        project: str,
        name: str | None,
        folder: Path,
        settings: dict[str, Any],
    ) -> None:
        try:
            # perf: 1.2 s; a run without wandb does not pay for it.
            import wandb
        except ImportError as error:
            raise LogError(
                f"log.wandb={mode} came, but wandb cannot be imported ({error}); "
                "install it with `pip install wandb` or set log.wandb=disabled"
            ) from error
        self._wandb = wandb
        (folder / "wandb").mkdir(exist_ok=True)
        try:
            self._run = wandb.init(
                mode=mode,
                project=project,
                name=name or folder.resolve().name,
                dir=folder,
                id=_run_id(folder / "wandb" / "run_id"),
                resume="allow",
                config=settings,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise LogError(
                f"wandb did not start in mode {mode}: {error}; "
                "log in, or set log.wandb=offline or log.wandb=disabled"
            ) from error
        # why: wandb's own step cannot go back; ours does when a run resumes from a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **dict(_flat(values))})

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({"step": step, name: self._wandb.Image(str(path))})

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path) -> str:
    if not path.exists():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _wandb_mode(cfg: LogConfig) -> WandbMode:
    """The variable WANDB_MODE, if it is set, goes before the configuration."""
    asked = os.environ.get("WANDB_MODE") or cfg.wandb
    for mode in get_args(WandbMode):
        if asked == mode:
            return mode
    raise LogError(f"WANDB_MODE={asked} came; expected offline, online or disabled: unset it")
