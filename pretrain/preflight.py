"""What a person can have got wrong about a run, found before any rank or process group exists."""

from pathlib import Path
from typing import Any

from data_pipeline.loader import check
from data_pipeline.shards import Manifest
from parallel.mesh import check_supported, degrees
from pretrain import checkpoint, config, run, sampling
from pretrain.config import Config


def preflight(cfg: Config, world: int) -> Manifest:
    """Checks a run of `world` ranks; every rank finds the same.

    Raises ConfigError, LayoutError, DataError, SamplingError, RunError or CheckpointError.
    """
    # why: first, or one would be told to start more ranks, and only then that it is no use
    check_supported(cfg.mesh)
    sizes = degrees(cfg.mesh, world)
    config.check_batch(cfg, sizes)
    manifest = check(
        cfg.data,
        num_classes=cfg.model.num_classes,
        channels=cfg.model.in_channels,
        input_size=cfg.model.input_size,
    )
    if cfg.sample.every:
        sampling.check(cfg.sample, cfg.objective)
    run.check_place(Path(cfg.run_dir))
    checkpoint.check_fit(Path(cfg.run_dir), identity(cfg, manifest))
    return manifest


def identity(cfg: Config, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """What must be the same for a run to go on: model, objective, data and its order."""
    data = {
        "fingerprint": manifest.split(cfg.data.split).index_sha256,
        "global_batch": cfg.data.global_batch,
        "order": cfg.data.order,
        "seed": cfg.seed,
    }
    return {
        "model": cfg.model.model_dump(mode="json"),
        "objective": cfg.objective.model_dump(mode="json"),
        "data": data,
    }
