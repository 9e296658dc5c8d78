"""Tiny runs of every family on 16×8×8 latents, as configuration files."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

MODELS: dict[str, dict[str, Any]] = {
    "dit": {"family": "dit", "depth": 2, "width": 32, "num_heads": 2, "patch": 2},
    "dit-moe": {
        "family": "dit-moe",
        "depth": 2,
        "width": 32,
        "num_heads": 2,
        "patch": 2,
        "moe": {"experts": 4, "hidden_ratio": 1.0},
    },
    "udit": {"family": "udit", "width": 16, "num_heads": 2, "depth": [1, 1, 1, 1, 1]},
    "udit-moe": {
        "family": "udit",
        "width": 16,
        "num_heads": 2,
        "depth": [1, 1, 1, 1, 1],
        "moe": {"experts": 4, "hidden_ratio": 0.5, "stages": ["enc2", "latent"]},
    },
}


def write(folder: Path, model: str, data: Path, **changes: Any) -> Path:
    """A configuration of `model` on `data`, with changes by dotted key, as FOLDER/MODEL.yaml.

    MODEL+mup is the model under muP at twice its base width; a DiT's residual branches are scaled.
    """
    family, _, under = model.partition("+")
    shape = {"input_size": 8, "in_channels": 16, "num_classes": 10, "learn_sigma": False}
    tree = OmegaConf.create(
        {
            "model": MODELS[family] | shape,
            "objective": {"kind": "flow"},
            "data": {"path": str(data), "global_batch": 8, "order": "samples"},
            "schedule": {"kind": "constant"},
            "optim": {"lr": 1e-3},
            "steps": 40,
            "threads": 1,
            "log": {"every": 1, "wandb": "disabled"},
            "checkpoint": {"every": 10},
            "run_dir": str(folder / "run"),
        }
    )
    for key, value in changes.items():
        OmegaConf.update(tree, key.replace("__", "."), value)
    if under == "mup":
        base: dict[str, Any] = {"base_width": tree.model.width // 2, "output_mult": 3.0}
        base |= {} if tree.model.family == "udit" else {"base_depth": 3}
        OmegaConf.update(tree, "parametrisation", "mup")
        OmegaConf.update(tree, "model.mup", base)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{model}.yaml"
    OmegaConf.save(tree, path)
    return path
