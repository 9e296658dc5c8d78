"""`pretrain plan`: a run's configuration to what it needs, as plain values."""

from dataclasses import asdict
from typing import Any

from parallel.mesh import degrees
from pretrain import plan
from pretrain.config import Config, ConfigError, check_batch

MEMORY = {"h100": 80 * 1024**3, "h200": 141 * 10**9}  # bytes a device has, vendors' data sheets


def of(cfg: Config, gpus: int, device: str) -> dict[str, Any]:
    """The plan of a run on `gpus` ranks (0: as many as the mesh says, one if it does not).

    Raises ConfigError for an unknown device or a batch that does not split, LayoutError for degrees
    that do not fit.
    """
    if device not in (*MEMORY, "cpu"):
        raise ConfigError(f"--device {device}: known devices are {', '.join(MEMORY)} and cpu")
    mesh = cfg.mesh
    sizes = degrees(mesh, gpus or mesh.dp_replicate * (mesh.dp_shard or 1) * mesh.sp * mesh.tp)
    check_batch(cfg, sizes)
    layout = plan.Layout(
        dp_replicate=sizes.dp_replicate,
        dp_shard=sizes.dp_shard,
        tp=sizes.tp,
        ep=sizes.ep,
        precision=cfg.precision,
        micro_batch=cfg.data.global_batch // (sizes.data * cfg.accum),
        accum=cfg.accum,
        reshard_after_forward=mesh.reshard_after_forward,
    )
    counted = plan.plan(cfg.model, layout)
    values = asdict(counted)
    values["ranks"] = sizes.world
    values["micro_batch"] = layout.micro_batch
    values["flops_run"] = counted.flops_train_per_image * cfg.data.global_batch * cfg.steps
    values["device"] = device
    if device in MEMORY:
        values["fits_memory"] = counted.per_rank.total <= MEMORY[device]
    return values
