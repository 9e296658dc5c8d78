"""What a sweep found, as plain values, a table and a picture. Starts no trial."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.launch import Place
from pretrain.benches.record import record
from pretrain.manifest import write_whole
from pretrain.metrics import plain
from pretrain.models.build import ModelConfig
from pretrain.planning.macs import flops_per_image
from pretrain.tune import Sweep, Trial
from pretrain.tune_outcome import SCORE, Outcome
from pretrain.tune_search import Losses, Point, Space, mean, verdict

RESULTS, PICTURE = "tune.json", "tune.png"
FAR = 4  # times the lowest loss, from which on the picture's scale is logarithmic
_OF_BEST = ("loss", "seeds", "spread", "at_edge")


def results(sweep: Sweep) -> dict[str, Any]:
    """Everything about a sweep, in values that JSON holds."""
    search = sweep.search
    trials = [(trial, sweep.outcome(trial)) for trial in sweep.trials()]
    counted: dict[ModelConfig, int] = {}
    rows = [_row(search.spaces, *one, counted) for one in trials]
    states = [outcome.state for _, outcome in trials]
    losses = sweep.losses()
    # why: of a search that is not through, what is best so far is no verdict.
    judged = losses if sweep.whole() else {width: {} for width in losses}
    asked = {
        "config": str(search.path),
        "overrides": list(search.overrides),
        "parameters": {one.key: one.text for one in search.spaces},
        "widths": list(search.widths),
        "seeds": search.seeds,
        "best": search.best,
        "random": search.random,
        "seed": search.seed,
        "budget": search.budget,
        "beyond_budget": sweep.beyond_budget,
        "parametrisation": sweep.base.parametrisation,
    }
    return {
        **record("tune", Place.here()),
        "command": sys.argv,
        **asked,
        "score": SCORE,
        "settings": sweep.base.model_dump(mode="json"),
        "counts": {state: states.count(state) for state in dict.fromkeys(states)},
        "complete": all(outcome.is_result for _, outcome in trials),
        "beside": sweep.beside(),
        "flops": sum(row["flops"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "verdict": plain(verdict(search.spaces, judged, gridded=search.random is None)),
        "losses": table(search.spaces, losses),
        "trials": rows,
    }


def save(sweep: Sweep) -> dict[str, Any]:
    """Writes OUT/tune.json, old or new but never half; the same values."""
    found = results(sweep)
    sweep.search.out.mkdir(parents=True, exist_ok=True)
    write_whole(sweep.search.out / RESULTS, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


def brief(found: dict[str, Any]) -> dict[str, Any]:
    """What people want to see of it first; trials without a loss by name."""
    words = ("parametrisation", "widths", "seeds", "score", "counts", "beyond_budget", "flops")
    words += ("seconds", "complete")
    shown = {word: found[word] for word in words} | {"verdict": dict(found["verdict"])}
    best = []
    for row in shown["verdict"].pop("best"):
        values = row["values"] or dict.fromkeys(found["parameters"])
        best.append({"width": row["width"], **values} | {k: row[k] for k in _OF_BEST})
    failed = [
        {word: row[word] for word in ("name", "state", "reason")}
        for row in found["trials"]
        if row["state"] in ("diverged", "failed")
    ]
    return shown | {"losses": found["losses"], "best": best, "without a loss": failed}


def told(found: dict[str, Any]) -> list[str]:
    """The verdict in sentences."""
    verdict, lines = found["verdict"], []
    if found["beside"]:
        names = ", ".join(found["beside"])
        lines.append(f"not a part of this search, and not counted: {names}")
    if not found["complete"]:
        return lines
    narrow, wide = found["widths"][0], found["widths"][-1]
    edges = sorted({key for row in verdict["best"] for key in row["at_edge"]})
    moves = f"from width {narrow} to width {wide} the best point moves by {verdict['moves']} steps"
    if verdict["transfers"]:
        lines.append(f"it transfers: {moves}")
    elif verdict["transfers"] is False:
        lines.append(f"it does not transfer: {moves}")
    elif narrow == wide:
        lines.append("whether it transfers cannot be said of one width")
    elif edges:
        keys = ", ".join(edges)
        lines.append(
            f"whether it transfers cannot be said: best at the end of what was tried ({keys})"
        )
    else:
        lines.append("whether it transfers cannot be said of these trials")
    if verdict["wider_is_better"] is False:
        lines.append(f"at the best point of width {narrow} a wider model is not better")
    return lines


def _row(
    spaces: Sequence[Space], trial: Trial, outcome: Outcome, counted: dict[ModelConfig, int]
) -> dict[str, Any]:
    """counted: FLOPs an image of models that were counted before."""
    cfg = trial.cfg
    if outcome.steps and cfg.model not in counted:
        counted[cfg.model] = flops_per_image(cfg.model)
    images = cfg.data.global_batch * outcome.steps
    facts = trial.folder / "environment.json"
    return {
        "name": trial.name,
        "width": trial.width,
        "values": {one.key: value for one, value in zip(spaces, trial.point, strict=True)},
        "seed": trial.seed,
        "state": outcome.state,
        "reason": outcome.reason,
        "loss": outcome.loss,
        "first_loss": outcome.first_loss,
        "steps": outcome.steps,
        "seconds": outcome.seconds,
        "flops": counted[cfg.model] * images if outcome.steps else 0,
        "run_dir": str(trial.folder),
        "commit": json.loads(facts.read_text())["commit"] if facts.is_file() else None,
    }


def table(spaces: Sequence[Space], by_width: Mapping[int, Losses]) -> list[dict[str, Any]]:
    """A row a point, a column a width: mean loss, half the spread over seeds, their number."""
    points = dict.fromkeys(point for losses in by_width.values() for point in losses)
    rows = []
    for point in sorted(points, key=_order):
        row: dict[str, Any] = {one.key: v for one, v in zip(spaces, point, strict=True)}
        for width, losses in sorted(by_width.items()):
            row[f"width {width}"] = _cell(losses.get(point, []))
        rows.append(row)
    return rows


def _cell(losses: Sequence[float]) -> str:
    if not losses:
        return ""
    middle = mean(losses)
    if not math.isfinite(middle):
        lost = sum(not math.isfinite(loss) for loss in losses)
        return "diverged" if len(losses) == 1 else f"diverged ({lost} of {len(losses)} seeds)"
    if len(losses) == 1:
        return f"{middle:.4f}"
    return f"{middle:.4f} ±{(max(losses) - min(losses)) / 2:.4f} ({len(losses)} seeds)"


def _order(point: Point) -> tuple[tuple[bool, float, str], ...]:
    """Numbers by size, before words."""
    return tuple((True, 0.0, v) if isinstance(v, str) else (False, float(v), "") for v in point)


def draw(path: Path, sweep: Sweep) -> None:
    """Loss against each parameter, one line a width, seeds as dots; crosses above are trials that
    diverged. Of several parameters there is a panel each, without lines."""
    from matplotlib.figure import Figure

    spaces, by_width = sweep.search.spaces, sweep.losses()
    figure = Figure(figsize=(5.2 * len(spaces) + 1.5, 4.2), layout="constrained")
    panels = figure.subplots(1, len(spaces), squeeze=False)[0]
    for index, (one, panel) in enumerate(zip(spaces, panels, strict=True)):
        words = sorted({p[index] for own in by_width.values() for p in own}, key=str)
        numeric = not any(isinstance(word, str) for word in words)
        for color, (width, losses) in enumerate(sorted(by_width.items())):
            places = {p: p[index] if numeric else words.index(p[index]) for p in losses}
            finite = sorted(
                (places[p], mean(own)) for p, own in losses.items() if math.isfinite(mean(own))
            )
            dots = [(places[p], loss) for p, own in losses.items() for loss in own]
            dots = [dot for dot in dots if math.isfinite(dot[1])]
            lost = [places[p] for p, own in losses.items() if not math.isfinite(mean(own))]
            style = f"C{color}"
            if len(spaces) == 1:
                panel.plot(*zip(*finite, strict=True) if finite else ((), ()), color=style)
            panel.plot(*zip(*dots, strict=True) if dots else ((), ()), ".", color=style)
            # why: where there is no loss, the height of a mark says nothing; widths lie beside it.
            above = [0.97 - 0.03 * color] * len(lost)
            panel.plot(lost, above, "x", color=style, transform=panel.get_xaxis_transform())
            panel.plot([], [], ".-", color=style, label=f"width {width}")
        if numeric and one.kind != "lin" and all(float(word) > 0 for word in words):
            panel.set_xscale("log", base=2)
        elif not numeric:
            panel.set_xticks(range(len(words)), words)
        low, high = panel.get_ylim()
        if low > 0 and high > FAR * low:
            panel.set_yscale("log")
        panel.set_xlabel(one.key)
    panels[0].set_ylabel("loss over the last fifth of the steps")
    panels[-1].legend()
    figure.suptitle(f"{sweep.search.path.stem}, {sweep.base.parametrisation}")
    figure.savefig(path, dpi=110)
