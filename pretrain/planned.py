"""`pretrain plan`: a run's configuration to what it needs, as plain values."""

import math
from dataclasses import asdict
from typing import Any

from parallel import fsdp
from parallel.mesh import Degrees, Mesh, degrees
from parallel.rehearse import rehearsed
from parallel.shards import local
from pretrain import plan
from pretrain.config import Config, ConfigError, check_batch
from pretrain.parallelize import sharded
from pretrain.preflight import check_axes

MEMORY = {"h100": 80 * 1024**3, "h200": 141 * 10**9}  # bytes a device has, vendors' data sheets


def of(cfg: Config, gpus: int, device: str) -> dict[str, Any]:
    """The plan of a run on `gpus` ranks (0: as many as the mesh says, or the fewest it needs).

    Raises ConfigError for an unknown device or a batch that does not split, LayoutError for degrees
    that do not fit.
    """
    if device not in (*MEMORY, "cpu"):
        raise ConfigError(f"--device {device}: known devices are {', '.join(MEMORY)} and cpu")
    if cfg.engine != "fsdp2":
        raise ConfigError(
            f"engine={cfg.engine}: what is planned are the bytes of FSDP2; set engine=fsdp2"
        )
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
    counted = plan.plan(cfg.model, layout)
    values = asdict(counted)
    values["built"] = built(cfg, sizes)
    values["ranks"] = sizes.world
    values["micro_batch"] = layout.micro_batch
    values["flops_run"] = counted.flops_train_per_image * cfg.data.global_batch * cfg.steps
    values["device"] = device
    if device in MEMORY:
        away = sum(values["built"].values()) if mesh.offload else 0  # in CPU memory
        values["fits_memory"] = counted.per_rank.total - away <= MEMORY[device]
    return values


def built(cfg: Config, sizes: Degrees, rank: int = 0) -> dict[str, int]:
    """Bytes of the shards that stand on a rank: the model cut on meta, in a rehearsed world.

    This is what the plan's weights, grads, optimizer and ema are held against.
    """
    with rehearsed(rank, sizes.world):
        mesh = Mesh(sizes, "cpu")
        model = sharded(cfg.model, cfg.mesh, mesh, cfg.precision, cfg.remat)
        shards = [local(parameter) for parameter in model.parameters()]
        owned = [piece.values for piece in fsdp.pieces(model, mesh).values()]
    held, own = (sum(t.numel() * t.element_size() for t in ts) for ts in (shards, owned))
    return {
        "weights": held,
        "grads": held + (own if sizes.dp_replicate > 1 else 0),
        "optimizer": 2 * own,
        "ema": len(cfg.ema.names) * own,
    }
