"""`pretrain plan`: a run's configuration to what it needs, as plain values."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from parallel import deepspeed
from parallel.chips import CHIPS, chip_of
from parallel.mesh import Degrees, degrees
from pretrain import config
from pretrain.cluster import site
from pretrain.config import Config, ConfigError, check_batch
from pretrain.planning import compare, hours, macs, plan, proposals
from pretrain.planning.layout import Layout
from pretrain.preflight import check_axes


@dataclass(frozen=True)
class Counted:
    """A run on a layout, counted."""

    cfg: Config
    layout: Layout
    plan: plan.Plan

    def hours(self, figures: hours.Figures, price: float | None = None) -> hours.Hours:
        return hours.of(self.cfg.model, self.layout, self.cfg.steps, figures, price)

    @property
    def flops(self) -> int:
        """Of training, an image."""
        return self.plan.flops_train_per_image


def of(
    cfg: Config,
    gpus: int,
    device: str,
    links: Path | None = None,
    price: float | None = None,
    *,
    search: bool = False,
) -> dict[str, Any]:
    """The plan of a run on `gpus` ranks (0: as many as the mesh says, or the fewest it needs).

    links: link file of a site; None: the site's own if there is one, else data sheets. price: of a
    GPU hour. search: for other layouts of as many ranks that fit. Raises ConfigError for an unknown
    device, a price below 0 or a batch that does not split, LayoutError for degrees or an engine
    that do not fit, LinksError for a link file that is broken or of another device.
    """
    if device not in (*CHIPS, "cpu"):
        raise ConfigError(f"--device {device}: known devices are {', '.join(CHIPS)} and cpu")
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--price {price}: expected what a GPU hour costs, 0 or more")
    if cfg.precision == "fp8" and device in CHIPS and CHIPS[device].fp8 is None:
        raise ConfigError(
            f"precision=fp8 on --device {device}, which has no FP8; set precision=bf16, or give "
            "another device"
        )
    one = counted(cfg, gpus, device)
    values: dict[str, Any] = asdict(one.plan)
    values["ranks"] = one.layout.sizes.world
    values["mesh"] = asdict(one.layout.sizes)
    values["engine"], values["precision"] = cfg.engine, cfg.precision
    values["remat"], values["accum"] = cfg.remat.mode, cfg.accum
    values["micro_batch"] = one.layout.micro_batch
    values["flops_run"] = one.flops * cfg.data.global_batch * cfg.steps
    if cfg.tuning is not None:
        values["flops_tuning"] = cfg.tuning.flops
        values["tuning_share"] = cfg.tuning.flops / values["flops_run"] if cfg.steps else None
    values["device"] = device
    if device in CHIPS:
        values["fits_memory"] = one.plan.per_rank.total <= CHIPS[device].memory
    values |= asdict(_hours(one, device, links, price))
    return values | (asdict(_search(one, device, links)) if search and device in CHIPS else {})


def _search(one: Counted, device: str, links: Path | None) -> proposals.Search:
    figures, _ = figures_of(one, device, links)
    return proposals.search(
        one.cfg.model,
        one.layout,
        one.cfg.data.global_batch,
        CHIPS[device].memory,
        None if isinstance(figures, str) else figures,
        compiled=one.cfg.compile,
    )


def searched(cfg: Config, world: int, device: str) -> tuple[int, proposals.Search]:
    """Bytes on rank 0 of what is configured, and the layouts that fit a device of the table."""
    one = counted(cfg, world, device)
    return one.plan.per_rank.total, _search(one, device, None)


def prediction(cfg: Config, world: int, device: torch.device) -> compare.Prediction:
    """Of memory and step time of a run on these ranks, which have the chip of this one."""
    one = counted(cfg, world, name_of(device))
    return compare.prediction(one.plan.per_rank, hours_of(one, name_of(device)))


def name_of(device: torch.device) -> str:
    """What `--device` calls it: a chip of the table, "cpu", or "unknown GPU"."""
    if device.type != "cuda":
        return "cpu"
    chip = chip_of(torch.cuda.get_device_name(device))
    return next((key for key, other in CHIPS.items() if other is chip), "unknown GPU")


def hours_of(one: Counted, device: str) -> hours.Hours:
    """Seconds of a step on such a device, by the site's links file or else data sheets."""
    return _hours(one, device, None, None)


def counted(cfg: Config, gpus: int, device: str = "cpu") -> Counted:
    """Raises ConfigError or LayoutError as `of` does."""
    mesh = cfg.mesh
    least = mesh.dp_shard or math.ceil(mesh.ep * mesh.etp / (mesh.sp * mesh.tp))
    sizes = degrees(mesh, gpus or mesh.dp_replicate * least * mesh.sp * mesh.tp)
    check_batch(cfg, sizes)
    check_axes(cfg, sizes)
    if cfg.engine != "fsdp2":
        deepspeed.check(
            int(cfg.engine[-1]),
            sizes,
            experts=getattr(cfg.model, "moe", None) is not None,
            compiled=cfg.compile,
            deterministic=cfg.deterministic,
        )
    layout = Layout(
        sizes=sizes,
        precision=cfg.precision,
        micro_batch=cfg.data.global_batch // (sizes.data * cfg.accum),
        accum=cfg.accum,
        reshard_after_forward=mesh.reshard_after_forward,
        unit_bytes=mesh.unit_mb << 20,
        remat=cfg.remat,
        averages=len(cfg.ema.names),
        engine=cfg.engine,
        offload=mesh.offload,
        deterministic=cfg.deterministic,
        device=device,
    )
    return Counted(cfg, layout, plan.plan(cfg.model, layout))


def executed(cfg: Config, sizes: Degrees) -> int:
    """FLOPs of training on one image as a run of these degrees executes them."""
    micro_batch = cfg.data.global_batch // (sizes.data * cfg.accum)
    layout = Layout(sizes, cfg.precision, micro_batch)
    return macs.flops_per_image(cfg.model, micro_batch, pairs=layout.pairs)


def of_run(folder: Path, ranks: int, device: str = "cpu") -> Counted:
    """What a run directory's own configuration needs on so many ranks."""
    return counted(config.load(folder / "config.yaml", []), ranks, device)


def _hours(one: Counted, device: str, links: Path | None, price: float | None) -> hours.Hours:
    figures, passed_over = figures_of(one, device, links)
    if isinstance(figures, str):
        return hours.unknown(figures + passed_over)
    found = one.hours(figures, price)
    return replace(found, hours_basis=found.hours_basis + passed_over)


def figures_of(one: Counted, device: str, links: Path | None) -> tuple[hours.Figures | str, str]:
    """What this cluster reaches, or why that is not known; and which file was passed over."""
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
        missing = f"{path} holds no training run; run slurm/acceptance.sh to its end"
        return (missing if figures is None else figures), ""
    if device not in CHIPS:
        why = f"no figures for a {device}: run slurm/acceptance.sh here, or give --links FILE"
        return why, passed_over
    return hours.assumed(CHIPS[device], one.layout.sizes.world), passed_over
