"""The coordinate check: whether the sizes of what layers compute know the width of the model.

A few steps are trained at several widths and seeds, on one process in float32, with the optimizer's
own factors. What is measured is the mean absolute activation, by type of layer: at the start, after
the first step and after the last, and how far the last is from the start: the start may hide a
learning rate that does not fit. Each is fitted as size ~ width^slope; under muP no slope is far
from 0.

Latents, labels, noise and times are random numbers of the seed, the same at every step and width:
no data is read, and what is measured is what is trained on. No schedule, averages or checkpoints.
Source: Yang et al., Tensor Programs V, appendix D.1.
"""

import math
import operator
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.dispatch import Beside, Dispatched, Dispatcher, Experts
from parallel.experts import Picks
from parallel.shards import Extent, Piece, box_of
from pretrain import balance
from pretrain.models.attention import Attention, PhaseAttention
from pretrain.models.build import Model, ModelConfig, build
from pretrain.models.dit import DiT
from pretrain.models.init import initialise
from pretrain.models.layers import AdaLN, Block, Condition, Mlp, SwiGLU
from pretrain.models.moe import MoE, Routing, moe_layers
from pretrain.models.mup import factors
from pretrain.models.rep import FeedForward
from pretrain.models.udit import Down, Head, UDiT, Up
from pretrain.noise import draw
from pretrain.objectives import Objective
from pretrain.optim import AdamW, OptimConfig

LIMIT = 0.1  # largest slope, either way, that counts as none
MOVED = 0.2  # the same for how far training has moved them: smaller numbers, which scatter more
_SPAN = 4.0  # a panel shows at least sizes from 1/4 to 4 times its middle
TIMES = ("init", "first", "last", "moved")  # when sizes are taken; moved: last minus init

# (module, what it was given, what it gave) -> what is measured
_Read = Callable[[Any, tuple[Any, ...], Any], Tensor]

# Layers whose output is measured: by the class of module that holds them, type and place in it.
_PARTS: dict[type[nn.Module], dict[str, str]] = {
    DiT: {"embedding": "embed"},
    UDiT: {"embedding": "stem", "skip 2": "reduce2", "skip 1": "reduce1"},
    Condition: {"time in": "time1", "time": "time2", "label": "label", "adaLN shared": "adaln"},
    AdaLN: {"adaLN low rank": "down", "adaLN": "up"},
    PhaseAttention: {"attention depthwise": "mix"},
    Attention: {"q": "q", "k": "k", "v": "v", "attention output": "out"},
    Mlp: {"{feed} in": "fc1", "{feed} out": "fc2"},
    SwiGLU: {"{feed} gate": "gate", "{feed} in": "up", "{feed} out": "down"},
    FeedForward: {
        "{feed} in, first": "expand.first",
        "{feed} in": "expand.second",
        "{feed} out, first": "contract.first",
        "{feed} out": "contract.second",
    },
    Down: {"down": "conv"},
    Up: {"up": "conv"},
    Head: {"head convolution": "conv"},
}


class CoordinateError(ValueError):
    """A check that cannot be made: what came, what was expected, what to change."""


@dataclass(frozen=True)
class CheckConfig:
    """How the members of a family are trained."""

    objective: Objective
    optim: OptimConfig
    clip: float | None  # largest gradient norm
    batch: int
    steps: int
    seeds: int

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise CoordinateError(f"--steps {self.steps}: expected at least 2, first and last")


@dataclass(frozen=True)
class Size:
    """Mean absolute values of one type of layer, in one model."""

    layer: str
    at: int  # width or depth
    seed: int
    init: float
    first: float
    last: float
    moved: float


@dataclass(frozen=True)
class Verdict:
    """Slopes of one type of layer; null: there is no fit, because it is exactly 0 somewhere."""

    layer: str
    init: float | None
    first: float | None
    last: float | None
    moved: float | None
    error: float | None  # largest standard error of what is judged; more seeds make it less
    passes: bool


def check(
    members: dict[int, ModelConfig], cfg: CheckConfig, say: Callable[[str], None]
) -> tuple[list[Size], list[Verdict]]:
    """Measures a family, its members by width or depth, and judges every type of layer.

    Raises CoordinateError for fewer than two members.
    """
    if len(members) < 2:
        raise CoordinateError(
            f"{list(members)}: a slope needs at least two different ones; give such as "
            "--widths 1x,2x,4x,8x"
        )
    sizes: list[Size] = []
    for at, model in sorted(members.items()):
        for seed in range(cfg.seeds):
            began = time.perf_counter()
            found = measure(model, cfg, seed)
            sizes += [Size(layer, at, seed, **values) for layer, values in found.items()]
            say(f"{at}, seed {seed}: {time.perf_counter() - began:.1f} s")
    return sizes, judge(sizes)


def judge(sizes: Sequence[Size]) -> list[Verdict]:
    """A type passes if its sizes at the start and after the last step, and what lies between, have
    no slope; what is exactly 0 at the start has to be flat from the first step at which it is not.
    """
    by_layer: dict[str, list[Size]] = defaultdict(list)
    for size in sizes:
        by_layer[size.layer].append(size)
    verdicts = []
    for layer, rows in by_layer.items():
        fits = {when: fit([(row.at, getattr(row, when)) for row in rows]) for when in TIMES}
        begins = "first" if all(row.init == 0 for row in rows) else "init"
        late = begins == "first" and all(row.first == 0 for row in rows)
        checked = ("last",) if late else (begins, "last")
        judged = [(fits[when], LIMIT) for when in checked] + [(fits["moved"], MOVED)]
        passes = all(one is not None and abs(one[0]) <= limit for one, limit in judged)
        slopes = {when: one and one[0] for when, one in fits.items()}
        error = max((one[1] for one, _ in judged if one is not None), default=None)
        verdicts.append(Verdict(layer, **slopes, error=error, passes=passes))
    return verdicts


def fit(points: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """Slope of log2 size over log2 width by least squares and its standard error; None if a size
    is 0 or not finite."""
    if any(not math.isfinite(size) or size <= 0 for _, size in points):
        return None
    at, size = np.log2(np.asarray(points, dtype=np.float64)).T
    spread = np.square(at - at.mean()).sum()
    slope = ((at - at.mean()) * size).sum() / spread
    missed = size - size.mean() - slope * (at - at.mean())
    free = max(1, len(points) - 2)
    return float(slope), math.sqrt(np.square(missed).sum() / free / spread)


def measure(model_cfg: ModelConfig, cfg: CheckConfig, seed: int) -> dict[str, dict[str, float]]:
    """Trains one model and gives sizes by type of layer and time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = build(model_cfg)
    model.to_empty(device=device)
    initialise(model, seed, model_cfg.zero_init_std)
    batch = _Batch.of(model_cfg, cfg, seed, device)
    pieces = {name: _piece(parameter) for name, parameter in model.named_parameters()}
    optimizer = AdamW(cfg.optim, pieces, factors(model_cfg))
    watch = _Watch(model.train())
    for step in range(cfg.steps):
        watch.when = {0: "init", 1: "first"}.get(step)
        _step(model, batch, cfg, optimizer)
    watch.when = "last"
    with torch.no_grad():
        batch.forward(model)
    return watch.sizes()


@dataclass(frozen=True)
class _Batch:
    """The one batch of a seed, noised."""

    objective: Objective
    x: Tensor
    noise: Tensor
    t: Tensor
    cond: Tensor

    @staticmethod
    def of(model: ModelConfig, cfg: CheckConfig, seed: int, device: torch.device) -> "_Batch":
        slots, shape = range(cfg.batch), (model.in_channels, model.input_size, model.input_size)
        tables = model.dropout_draws
        drawn, data = (draw(seed, step, slots, shape, tables=tables) for step in (0, 1))
        labels = (data.u * model.num_classes).long()
        labels = labels if drawn.drop.ndim == 1 else labels[:, None]
        cond = torch.where(drawn.drop < model.label_dropout, model.num_classes, labels)
        tensors = (data.noise, drawn.noise, cfg.objective.time(drawn.u), cond)
        return _Batch(cfg.objective, *(tensor.to(device) for tensor in tensors))

    def forward(self, model: nn.Module) -> tuple[Tensor, list[Routing]]:
        """Mean loss, (), and the routing of each MoE layer."""
        x_t = self.objective.corrupt(self.x, self.noise, self.t)
        pred, routings = model(x_t, self.objective.embed(self.t), self.cond, routing=True)
        return self.objective.loss(pred, self.x, self.noise, self.t).mean(), routings


def _step(model: Model, batch: _Batch, cfg: CheckConfig, optimizer: AdamW) -> None:
    """One update, as the engine makes it on one rank."""
    loss, routings = batch.forward(model)
    moe = getattr(model.cfg, "moe", None)
    if moe is not None:
        loss = loss + balance.auxiliary_loss(
            moe, routings, global_batch=cfg.batch, everywhere=lambda local: local
        )
    model.zero_grad()
    loss.backward()
    gradients = {name: _flat(p) for name, p in model.named_parameters()}
    norm = nn.utils.get_total_norm(gradients.values())
    divisor = torch.ones_like(norm) if cfg.clip is None else (norm / cfg.clip).clamp(min=1.0)
    never = torch.zeros((), dtype=torch.bool, device=norm.device)
    optimizer.step(gradients, 1.0, divisor, never)
    if moe is not None and moe.balance == "bias":
        biases = [layer.router.bias for layer in moe_layers(model)]
        counts = torch.stack([routing.counts.sum(0) for routing in routings])
        balance.update_biases(biases, counts, moe.bias_rate, never)


def _flat(parameter: nn.Parameter) -> Tensor:
    """Its gradient; zeros where none came, such as a label table that no sample of a batch read."""
    grad = parameter.grad
    return torch.zeros_like(parameter).view(-1) if grad is None else grad.reshape(-1)


def _piece(parameter: nn.Parameter) -> Piece:
    return Piece(parameter.data.view(-1), Extent(box_of(parameter), 0, parameter.numel()))


class _Watch:
    """Takes the sizes of what layers give, whenever `when` is set."""

    def __init__(self, model: Model) -> None:
        self.when: str | None = None
        self._start: dict[int, Tensor] = {}  # activations at init
        self._seen: dict[tuple[str, str], list[Tensor]] = {}
        for module in model.modules():
            if hasattr(module, "apart"):  # U-DiT's: its parts are then called one by one
                vars(module)["apart"] = True
        for layer, module, read in _layers(model):
            module.register_forward_hook(self._hook(layer, read))
        for moe in moe_layers(model):
            take = self._hook("experts", _given)
            moe.dispatcher = _Watched(moe.dispatcher, lambda out, take=take: take(None, (), out))

    def sizes(self) -> dict[str, dict[str, float]]:
        """Means over all layers of a type, by type and time; types in the order data passes."""
        found: dict[str, dict[str, float]] = {}
        for (layer, when), values in self._seen.items():
            found.setdefault(layer, {})[when] = torch.stack(values).mean().item()
        return found

    def _hook(self, layer: str, read: _Read) -> Callable[..., None]:
        key = len(self._start)
        self._start[key] = torch.empty(0)

        @torch.no_grad()
        def take(module: Any, given: tuple[Any, ...], gave: Any) -> None:
            if self.when is None:
                return
            value = read(module, given, gave).detach().float()
            self._note(layer, self.when, value)
            if self.when == "init":
                self._start[key] = value.clone()
            elif self.when == "last":
                self._note(layer, "moved", value - self._start[key])

        return take

    def _note(self, layer: str, when: str, value: Tensor) -> None:
        self._seen.setdefault((layer, when), []).append(value.abs().mean().double())


@dataclass(frozen=True)
class _Watched:
    """A dispatcher that shows what the routed experts give together, (T, D)."""

    own: Dispatcher
    show: Callable[[Tensor], None]

    def __call__(
        self, x: Tensor, picks: Picks, experts: Experts, beside: Beside | None
    ) -> Dispatched:
        found = self.own(x, picks, experts, beside)
        self.show(found.out)
        return found


def _layers(model: Model) -> Iterator[tuple[str, nn.Module, _Read]]:
    """Type of layer, the module that is watched, and what is read of it."""
    shared = [moe.shared for moe in moe_layers(model) if moe.shared is not None]
    beside = {id(part) for module in shared for part in module.modules()}
    for module in model.modules():
        feed = "shared expert" if id(module) in beside else "feed-forward"
        for layer, place in _PARTS.get(type(module), {}).items():
            if isinstance(part := operator.attrgetter(place)(module), nn.Module):
                yield layer.format(feed=feed), part, _given
        match module:
            case FeedForward():
                yield f"{feed} depthwise", module.mix, _added
            case Block():
                yield "residual stream", module, _first
            case MoE():
                yield "router logits", module.router, _logits
                if module.cfg.router_time:
                    yield "router time", module.router, _router_time
    readout, scale = model.get_submodule(model.readout), model.cfg.readout_scale
    yield "final features", readout, lambda _, given, __: given[0] / scale
    yield "prediction", readout, _given


def _given(_module: Any, _inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output


def _first(_module: Any, _inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output[0]


def _added(_module: Any, inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output - inputs[0]


def _logits(module: Any, inputs: tuple[Any, ...], _output: Any) -> Tensor:
    return F.linear(inputs[0].float(), module.weight.float())


def _router_time(module: Any, inputs: tuple[Any, ...], _output: Any) -> Tensor:
    return F.linear(inputs[1].float(), module.time.float())


def draw_sizes(
    path: Path, sizes: Sequence[Size], verdicts: Sequence[Verdict], axis: str, title: str
) -> None:
    """A panel for each type of layer, sizes over width or depth: means over seeds, and each seed
    as a dot. The title of one that does not pass is red."""
    from matplotlib.figure import Figure

    columns = 5
    rows = math.ceil(len(verdicts) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    names = ("init", "after step 1", "after the last step", "last − init")
    styles = (("C0", "-"), ("C2", "--"), ("C3", "-"), ("0.6", ":"))
    for panel, verdict in zip(grid, verdicts, strict=False):
        own = [size for size in sizes if size.layer == verdict.layer]
        places = sorted({size.at for size in own})
        for when, name, (color, line) in zip(TIMES, names, styles, strict=True):
            points = [(s.at, getattr(s, when)) for s in own if getattr(s, when) > 0]
            means = [np.mean([v for at, v in points if at == p] or [np.nan]) for p in places]
            panel.plot(places, means, line, color=color, label=name)
            panel.plot(*np.reshape(points, (-1, 2)).T, ".", color=color, markersize=3)
        panel.set_yscale("log", base=2)
        low, high = panel.get_ylim()
        middle = math.sqrt(low * high)
        # why: seeds differ by some percent, which would fill a panel of its own scale.
        panel.set_ylim(min(low, middle / _SPAN), max(high, middle * _SPAN))
        panel.set_xscale("log", base=2)
        panel.set_xticks(places, [str(place) for place in places])
        shown = (verdict.init, verdict.last, verdict.moved)
        slopes = ", ".join("–" if s is None else f"{s:+.2f}" for s in shown)
        panel.set_title(
            f"{verdict.layer} ({slopes})", size=9, color="black" if verdict.passes else "red"
        )
    for panel in list(figure.axes)[len(verdicts) :]:
        panel.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    figure.suptitle(
        f"{title}: mean |activation| over {axis} (slopes: init, last, last − init)",
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=100)
