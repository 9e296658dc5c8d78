"""The site's link file: what this cluster was measured to reach, written by an acceptance.

`$PRETRAIN_SITE/links.json` (default runs/site/links.json). `pretrain plan` reads it.
"""

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from pretrain.manifest import write_whole
from pretrain.planning import roofline
from pretrain.planning.hours import Figures
from pretrain.planning.traffic import Links


class LinksError(ValueError):
    """What was measured of a site cannot be read or used; the message says what to do."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Rates(_Part):
    """Bus bandwidth, GB/s, of the largest size that was measured."""

    all_reduce: PositiveFloat
    all_gather: PositiveFloat
    reduce_scatter: PositiveFloat
    all_to_all: PositiveFloat


class Efficiency(_Part):
    """How a training run of one config did, on the fewest nodes it ran on."""

    flops_per_image: PositiveInt  # of training; tells the model
    of_matmul: PositiveFloat  # model FLOP/s ÷ FLOP/s of the plain product


class LinkFile(_Part):
    format: Literal[1] = 1
    chip: str
    device: Literal["cuda", "cpu"]
    gpus_per_node: PositiveInt  # ranks a node
    nodes: PositiveInt
    date: str
    commit: str | None
    inside: Rates | None  # None: one rank a node
    across: Rates | None  # None: one node
    world: Rates | None  # None: the same as one of the two
    matmul_tflops: PositiveFloat  # one rank, bf16
    copy_gb_per_s: PositiveFloat
    efficiency: dict[str, Efficiency]  # by name of the config
    save_gb_per_s: PositiveFloat | None
    load_gb_per_s: PositiveFloat | None

    def is_of(self, device: str) -> bool:
        """device: as `pretrain plan --device` takes it."""
        return self.device == "cpu" if device == "cpu" else device.upper() in self.chip

    def figures(self, flops_per_image: int) -> Figures | None:
        """For a model of so many training FLOPs an image; None if no model was trained here.

        A model that was not trained here is taken to do as badly as the worst that was.
        """
        if not self.efficiency:
            return None
        worst = min(self.efficiency, key=lambda name: self.efficiency[name].of_matmul)
        own = (n for n, e in self.efficiency.items() if e.flops_per_image == flops_per_image)
        name = next(own, worst)
        share = self.efficiency[name].of_matmul
        same = self.efficiency[name].flops_per_image == flops_per_image
        inside, across, world = (
            {collective: rate * 1e9 for collective, rate in rates.model_dump().items()}
            if rates
            else {}
            for rates in (self.inside, self.across, self.world)
        )
        return Figures(
            machine=roofline.measured(
                self.matmul_tflops * 1e12, self.copy_gb_per_s * 1e9, fused=self.device != "cpu"
            ),
            flops=share * self.matmul_tflops * 1e12,
            links=Links(self.gpus_per_node, inside, across, world),
            basis=f"measured on {self.date}, {self.nodes} nodes, {self.chip}, commit "
            f"{(self.commit or 'unknown')[:8]}; computing as "
            f"{'' if same else 'another model, '}{name}{'' if same else ','} did: "
            f"{share * 100:.0f} % of {self.matmul_tflops:.4g} TFLOP/s",
        )


def folder() -> Path:
    return Path(os.environ.get("PRETRAIN_SITE") or "runs/site")


def default() -> Path | None:
    """The site's own file, if there is one."""
    path = folder() / "links.json"
    return path if path.is_file() else None


def read(path: Path) -> LinkFile:
    """Raises LinksError if it is not a link file."""
    try:
        return LinkFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise LinksError(f"{path} cannot be read: {error.strerror}; give a links.json") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise LinksError(
            f"{path} is no link file of this version: {where + ': ' if where else ''}"
            f"{first['msg']}; write it again with slurm/acceptance.sh, or remove it"
        ) from error


def write(file: LinkFile) -> Path:
    path = folder() / "links.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, file.model_dump_json(indent=1))
    return path
