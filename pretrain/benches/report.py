"""One report of what slurm/acceptance.sh left in a directory, and the site's link file out of it.

DIR/{links,dispatch,checkpoint}.json are results of benches, DIR/NAME-Nnodes/ runs of one config at
constant images a rank. Measures nothing.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.chips import chip_of
from parallel.launch import Place
from pretrain.benches.record import record
from pretrain.cluster import site
from pretrain.cluster.site import Efficiency, LinkFile, LinksError, Rates
from pretrain.manifest import write_whole
from pretrain.planning import hours, planned


@dataclass(frozen=True)
class Trained:
    """One short training."""

    name: str  # of the config
    counted: planned.Counted
    nodes: int
    step_seconds: float  # median; the first logged interval, in which all warms up, is left out
    memory: float  # bytes, the most of rank 0

    @property
    def ranks(self) -> int:
        return self.counted.layout.sizes.world

    @property
    def images_per_s(self) -> float:
        return self.counted.cfg.data.global_batch / self.step_seconds

    @property
    def flops(self) -> float:
        """Model FLOP/s of a rank."""
        return self.images_per_s * self.counted.flops / self.ranks


def report(folder: Path) -> dict[str, Any]:
    """Writes DIR/report.json and $PRETRAIN_SITE/links.json; returns what the first holds.

    Raises LinksError if a part is missing or broken.
    """
    links, dispatch, checkpoint = (
        _bench(folder, name) for name in ("links", "dispatch", "checkpoint")
    )
    runs = _runs(folder, links["ranks_per_node"])
    file = link_file(links, checkpoint, runs)
    found = record("site", Place.here()) | {
        **{key: links[key] for key in ("chip", "date", "commit", "ranks", "nodes", "versions")},
        "folder": str(folder),
        "link_file": str(site.write(file)),
        **file.model_dump(include={"matmul_tflops", "copy_gb_per_s"}),
        **file.model_dump(include={"save_gb_per_s", "load_gb_per_s"}),
        "memory_basis": "allocated on the device"
        if file.device == "cuda"
        else "of the whole process, interpreter and libraries too: not comparable with the plan",
        "bandwidth": [
            {"span": span, **rates}
            for span in ("inside", "across", "world")
            if (rates := file.model_dump()[span])
        ],
        "dispatch": dispatch["dispatchers"],
        **_beside_plan(runs, file),
    }
    write_whole(folder / "report.json", json.dumps(found, indent=1))
    return found


def link_file(
    links: dict[str, Any], checkpoint: dict[str, Any], runs: Sequence[Trained]
) -> LinkFile:
    """What `pretrain plan` needs to know. links, checkpoint: results of these benches."""
    spans: dict[str, dict[str, float]] = {}
    for row in sorted(links["links"], key=lambda row: row["bytes"]):
        spans.setdefault(row["span"], {})[row["collective"]] = row["gb_per_s"]
    return LinkFile(
        chip=links["chip"],
        device=links["device"],
        gpus_per_node=links["ranks_per_node"],
        nodes=links["nodes"],
        date=links["date"],
        commit=links["commit"],
        inside=_rates(spans, "inside"),
        across=_rates(spans, "across"),
        world=_rates(spans, "world"),
        matmul_tflops=links["matmul_tflops"],
        copy_gb_per_s=links["copy_gb_per_s"],
        # why in reverse: the run on the fewest nodes has the last word.
        efficiency={
            run.name: Efficiency(
                flops_per_image=run.counted.flops,
                of_matmul=run.flops / links["matmul_tflops"] / 1e12,
            )
            for run in reversed(runs)
        },
        save_gb_per_s=checkpoint["written_gb_per_s"],
        load_gb_per_s=checkpoint["read_gb_per_s"],
    )


def _rates(spans: dict[str, dict[str, float]], name: str) -> Rates | None:
    return Rates(**spans[name]) if name in spans else None


def _bench(folder: Path, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise LinksError(
            f"{path} cannot be read: {error.strerror}; give the directory of an acceptance that "
            "ran to its end"
        ) from error
    except json.JSONDecodeError as error:
        raise LinksError(f"{path} is no JSON: {error}; run slurm/acceptance.sh again") from error
    if not isinstance(found, dict) or found.get("bench") != name:
        raise LinksError(f"{path} is not what `pretrain bench {name} --json` writes; remove it")
    return found


def _runs(folder: Path, per_node: int) -> list[Trained]:
    """Of every config on every number of nodes, the fewest first."""
    found = [_run(path.parent, per_node) for path in sorted(folder.glob("*nodes/metrics.jsonl"))]
    if not found:
        raise LinksError(f"{folder} holds no training run NAME-Nnodes with metrics.jsonl in it")
    return sorted(found, key=lambda run: (run.name, run.nodes))


def _run(folder: Path, per_node: int) -> Trained:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if len(lines) < 2:
        raise LinksError(
            f"{folder / 'metrics.jsonl'} holds {len(lines)} lines; two are the fewest, of which "
            "the first is left out: train for more steps, or log more often"
        )
    world = json.loads((folder / "environment.json").read_text())["world"]
    return Trained(
        name=folder.name.rpartition("-")[0],
        counted=planned.of_run(folder, world),
        nodes=-(-world // per_node),
        step_seconds=statistics.median(line["step_time"] for line in lines[1:]),
        memory=max(line["memory_gb"] for line in lines) * 1e9,
    )


def _beside_plan(runs: Sequence[Trained], file: LinkFile) -> dict[str, list[dict[str, Any]]]:
    """Three tables, measured beside planned; errors are planned ÷ measured − 1, in percent.

    `sheet` is the plan from data sheets, what was said before this site was measured. The step time
    of the run that the link file took its efficiency from has no error: it is not a prediction.
    """
    chip = chip_of(file.chip)
    scaling, steps, memory = [], [], []
    for run in runs:
        first = next(other for other in runs if other.name == run.name)
        figures = file.figures(run.counted.flops)
        assert figures is not None, "this run is in the file"
        planned_s = run.counted.hours(figures).step_seconds
        sheet = run.counted.hours(hours.assumed(chip, run.ranks)).step_seconds if chip else None
        bytes_planned = run.counted.plan.per_rank.total
        which = {"config": run.name, "nodes": run.nodes}
        images = run.images_per_s / run.ranks
        scaling.append(
            which
            | {"ranks": run.ranks, "images_per_s": run.images_per_s, "tflops": run.flops / 1e12}
            | {"of_first": images / (first.images_per_s / first.ranks)}  # images/s of a rank
        )
        steps.append(
            which
            | {"measured": run.step_seconds, "planned": planned_s}
            | {"error_%": None if run is first else _error(planned_s, run.step_seconds)}
            | {"sheet": sheet, "sheet_%": _error(sheet, run.step_seconds)}
        )
        memory.append(
            which
            | {"measured": run.memory / 1e9, "planned": bytes_planned / 1e9}
            | {"error_%": _error(bytes_planned, run.memory)}
        )
    return {"weak_scaling": scaling, "step_seconds": steps, "memory_gb": memory}


def _error(planned_value: float | None, measured: float) -> float | None:
    return None if planned_value is None else 100 * (planned_value / measured - 1)
