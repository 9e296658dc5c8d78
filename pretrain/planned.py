"""`pretrain plan`: a run's configuration to what it needs, as plain values."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from parallel import fsdp
from parallel.mesh import Degrees, Mesh, degrees
from parallel.rehearse import rehearsed
from parallel.shards import local
from pretrain import config, hours, plan
from pretrain.cluster import site
from pretrain.config import Config, ConfigError, check_batch
from pretrain.meter import PEAK
from pretrain.parallelize import sharded
from pretrain.preflight import check_axes

MEMORY = {"h100": 80 * 1024**3, "h200": 141 * 10**9}  # bytes a device has, vendors' data sheets


@dataclass(frozen=True)
class Counted:
    """A run on a layout, counted."""

    cfg: Config
    layout: plan.Layout
    plan: plan.Plan

    def hours(self, figures: hours.Figures) -> hours.Hours:
        moe = getattr(self.cfg.model, "moe", None)
        room = 1.0
        if moe is not None and moe.dispatcher == "static":
            room = min(moe.capacity, self.layout.sizes.ep)
        return hours.of(self.plan, self.layout, self.cfg.steps, figures, room=room)

    @property
    def flops(self) -> int:
        """Of training, an image."""
        return self.plan.flops_train_per_image


def of(cfg: Config, gpus: int, device: str, links: Path | None = None) -> dict[str, Any]:
    """The plan of a run on `gpus` ranks (0: as many as the mesh says, or the fewest it needs).

    links: link file of a site; None: the site's own if there is one, else data sheets. Raises
    ConfigError for an unknown device or a batch that does not split, LayoutError for degrees that
    do not fit, LinksError for a link file that is broken or of another device.
    """
    if device not in (*MEMORY, "cpu"):
        raise ConfigError(f"--device {device}: known devices are {', '.join(MEMORY)} and cpu")
    if cfg.engine != "fsdp2":
        raise ConfigError(
            f"engine={cfg.engine}: what is planned are the bytes of FSDP2; set engine=fsdp2"
        )
    one = counted(cfg, gpus)
    sizes = one.layout.sizes
    values: dict[str, Any] = asdict(one.plan)
    values["built"] = built(cfg, sizes)
    values["ranks"] = sizes.world
    values["micro_batch"] = one.layout.micro_batch
    values["flops_run"] = one.flops * cfg.data.global_batch * cfg.steps
    if cfg.tuning is not None:
        values["flops_tuning"] = cfg.tuning.flops
        values["tuning_share"] = cfg.tuning.flops / values["flops_run"] if cfg.steps else None
    values["device"] = device
    if device in MEMORY:
        away = sum(values["built"].values()) if cfg.mesh.offload else 0  # in CPU memory
        values["fits_memory"] = one.plan.per_rank.total - away <= MEMORY[device]
    return values | asdict(_hours(one, device, links))


def counted(cfg: Config, gpus: int) -> Counted:
    """Raises ConfigError or LayoutError as `of` does."""
    mesh = cfg.mesh
    least = mesh.dp_shard or math.ceil(mesh.ep * mesh.etp / (mesh.sp * mesh.tp))
    sizes = degrees(mesh, gpus or mesh.dp_replicate * least * mesh.sp * mesh.tp)
    check_batch(cfg, sizes)
    check_axes(cfg, sizes)
    layout = plan.Layout(
        sizes=sizes,
        precision=cfg.precision,
        micro_batch=cfg.data.global_batch // (sizes.data * cfg.accum),
        accum=cfg.accum,
        reshard_after_forward=mesh.reshard_after_forward,
        unit_bytes=mesh.unit_mb << 20,
        remat=cfg.remat,
        averages=len(cfg.ema.names),
    )
    return Counted(cfg, layout, plan.plan(cfg.model, layout))


def of_run(folder: Path, ranks: int) -> Counted:
    """What a run directory's own configuration needs on so many ranks."""
    return counted(config.load(folder / "config.yaml", []), ranks)


def _hours(one: Counted, device: str, links: Path | None) -> hours.Hours:
    path = links or site.default()
    file = None if path is None else site.read(path)
    passed_over = ""
    if file is not None and not file.is_of(device):
        told = f"{path} was measured on {file.chip}, not on the {device} that is planned for"
        if links is not None:
            raise site.LinksError(f"{told}; give another --links or --device")
        file, passed_over = None, f" ({told})"
    if file is not None:
        figures = file.figures(one.flops)
        if figures is None:
            return hours.unknown(
                f"{path} holds no training run; run slurm/acceptance.sh to its end"
            )
        return one.hours(figures)
    if device not in MEMORY:
        why = f"no figures for a {device}: run slurm/acceptance.sh here, or give --links FILE"
        return hours.unknown(why + passed_over)
    found = one.hours(hours.assumed(PEAK[device.upper()], one.layout.sizes.world))
    return replace(found, hours_basis=found.hours_basis + passed_over)


def built(cfg: Config, sizes: Degrees, rank: int = 0) -> dict[str, int]:
    """Bytes of the shards that stand on a rank: the model cut on meta, in a rehearsed world.

    This is what the plan's weights, grads, optimizer and ema are held against.
    """
    with rehearsed(rank, sizes.world):
        mesh = Mesh(sizes, "cpu")
        model = sharded(cfg.model, cfg.mesh, mesh, cfg.compute)
        shards = [local(parameter) for parameter in model.parameters()]
        owned = [piece.values for piece in fsdp.pieces(model, mesh).values()]
    held, own = (sum(t.numel() * t.element_size() for t in ts) for ts in (shards, owned))
    return {
        "weights": held,
        "grads": held + (own if sizes.dp_replicate > 1 else 0),
        "optimizer": 2 * own,
        "ema": len(cfg.ema.names) * own,
    }
