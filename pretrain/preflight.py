"""What a person can have got wrong about a run, found before any rank or process group exists."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from data_pipeline.loader import check
from data_pipeline.shards import Manifest
from parallel import deepspeed, tensor
from parallel.errors import LayoutError
from parallel.fp8.backends import backend_for, capability, check_attention
from parallel.mesh import Degrees, degrees
from pretrain import config, run, sampling
from pretrain.config import Config
from pretrain.manifest import check_fit
from pretrain.models.build import build


def preflight(cfg: Config, world: int) -> Manifest:
    """Checks a run of `world` ranks; every rank finds the same.

    Raises ConfigError, LayoutError, DataError, SamplingError, RunError or CheckpointError.
    """
    sizes = degrees(cfg.mesh, world)
    config.check_batch(cfg, sizes)
    check_engine(cfg, sizes)
    check_axes(cfg, sizes)
    check_fp8(cfg)
    manifest = check(
        cfg.data,
        num_classes=cfg.model.num_classes,
        channels=cfg.model.in_channels,
        input_size=cfg.model.input_size,
    )
    if cfg.sample.every:
        sampling.check(cfg.sample, cfg.objective)
    run.check_place(Path(cfg.run_dir))
    check_fit(Path(cfg.run_dir), identity(cfg, manifest), cfg.ema.names, cfg.checkpoint.accept)
    return manifest


def check_engine(cfg: Config, sizes: Degrees) -> None:
    """Raises LayoutError if the engine is not installed, or cannot run this layout."""
    if cfg.engine == "fsdp2":
        return
    needed = {"deepspeed": "deepspeed", "megatron.core": "megatron"}
    for package, extra in needed.items():
        if (package == "deepspeed" or sizes.tp > 1) and not _installed(package):
            raise LayoutError(
                f"engine={cfg.engine} with mesh.tp={sizes.tp} needs {package}, which is not "
                f"installed; pip install 'dit-pretrain[{extra}]', or set engine=fsdp2"
            )
    deepspeed.check(
        int(cfg.engine[-1]),
        sizes,
        experts=getattr(cfg.model, "moe", None) is not None,
        compiled=cfg.compile,
        deterministic=cfg.deterministic,
    )


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def check_axes(cfg: Config, sizes: Degrees) -> None:
    """Raises LayoutError if an axis does not cut the model evenly, or remat chooses nothing."""
    for what, heads in cfg.model.heads().items():
        if heads % sizes.tp:
            raise LayoutError(
                f"mesh.tp={sizes.tp} must divide the {heads} attention heads of {what}; "
                f"set mesh.tp={_largest(heads, sizes.tp)}"
            )
    moe = getattr(cfg.model, "moe", None)
    if sizes.ep > 1 and moe is None:
        raise LayoutError(
            f"mesh.ep={sizes.ep}, but the model has no experts; set mesh.ep=1, or give model.moe"
        )
    if moe is not None and moe.experts % sizes.ep:
        raise LayoutError(
            f"mesh.ep={sizes.ep} must divide model.moe.experts={moe.experts}; "
            f"set mesh.ep={_largest(moe.experts, sizes.ep)}"
        )
    cut = cfg.engine == "fsdp2" and max(sizes.tp, sizes.ep) > 1
    if cfg.compile and cut and cfg.remat.mode == "full":
        # why: the parameter itself is kept for backward, and torch takes its mesh for a tensor.
        raise LayoutError(
            f"compile=true with remat.mode=full, mesh.tp={sizes.tp} and mesh.ep={sizes.ep}: torch "
            "cannot compile full recomputation of parameters that these axes cut; set "
            "remat.mode=selective, or compile=false"
        )
    micro = cfg.data.global_batch // (sizes.data * cfg.accum)
    for tokens in cfg.model.moe_tokens() if moe is not None else ():
        if micro * tokens % sizes.tp:
            raise LayoutError(
                f"mesh.tp={sizes.tp} must divide the {micro}·{tokens} = {micro * tokens} tokens "
                "that an MoE layer sees of a micro-batch; change data.global_batch or accum"
            )
    with torch.device("meta"):
        model = build(cfg.model)
    tensor.check(model, sizes.tp)
    units = len(model.units())
    if cfg.remat.mode != "none" and cfg.remat.every > units:
        raise LayoutError(
            f"remat.every={cfg.remat.every} chooses none of the model's {units} units; "
            f"set remat.every to at most {units}, or remat.mode=none"
        )


def check_fp8(cfg: Config) -> None:
    """Raises LayoutError if the model cannot train in FP8 as it is asked to, on this machine."""
    if cfg.precision != "fp8":
        return
    if cfg.engine != "fsdp2":
        raise LayoutError(
            f"precision=fp8 with engine={cfg.engine}: DeepSpeed gathers fp32 weights, and under tp "
            "Megatron's linears multiply by themselves, so no product would be in FP8 as it says; "
            "set engine=fsdp2, or precision=bf16"
        )
    with torch.device("meta"):
        units = len(build(cfg.model).units())
    if cfg.fp8.keep_first + cfg.fp8.keep_last >= units:
        raise LayoutError(
            f"fp8.keep_first + fp8.keep_last = {cfg.fp8.keep_first} + {cfg.fp8.keep_last} leaves "
            f"none of the model's {units} blocks in FP8; lower them, or set precision=bf16"
        )
    chip = capability(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    backend_for(cfg.fp8, chip)
    check_attention(cfg.fp8, chip, cfg.model.head_dims())


def _largest(whole: int, limit: int) -> int:
    return max(d for d in range(1, limit + 1) if whole % d == 0)


def identity(cfg: Config, manifest: Manifest | None) -> dict[str, Any]:
    """What must be the same for a run to go on: model, objective, data and its order.

    manifest: of the data; None if none was read yet.
    """
    data = (
        None
        if manifest is None
        else {
            "fingerprint": manifest.split(cfg.data.split).index_sha256,
            "global_batch": cfg.data.global_batch,
            "order": cfg.data.order,
            "seed": cfg.seed,
        }
    )
    model = cfg.model.model_dump(mode="json")
    for how in ("dispatcher", "capacity"):  # of the layout, not of the model
        (model.get("moe") or {}).pop(how, None)
    return {
        "model": model,
        "objective": cfg.objective.model_dump(mode="json"),
        "data": data,
    }


def facts(cfg: Config, manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    return {
        **identity(cfg, manifest),
        "latents": manifest.model_dump(mode="json") | {"splits": {}},
        "config": cfg.model_dump(mode="json"),
    }
