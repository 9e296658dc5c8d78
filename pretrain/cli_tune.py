"""`pretrain coord-check`: what is known of a family of widths before a rate is carried over."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from parallel import launch
from pretrain import config
from pretrain.benches.record import record
from pretrain.manifest import write_whole
from pretrain.showing import AsJson, show

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]


def coord_check(
    path: ConfigPath,
    overrides: Overrides = None,
    widths: Annotated[str, typer.Option(help="1x,2x,4x of the config's, or 96,192,384.")] = "",
    depths: Annotated[str, typer.Option(help="Instead: DiT's depths, such as 4,8,16,32.")] = "",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=2)] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Random latents, the same at each step.")] = 4,
    lr: Annotated[
        float, typer.Option(min=0, help="Not the config's: so large that few steps show.")
    ] = 1e-3,
    out: Annotated[Path | None, typer.Option(help="Directory; default: in run_dir.")] = None,
    as_json: AsJson = False,
) -> None:
    """Whether sizes of activations know the width; draws them. Exit code 1 if they do."""
    from pretrain import coordinates

    cfg = config.load(path, overrides or [])
    if bool(widths) == bool(depths):
        raise config.ConfigError(
            f"--widths {widths!r} and --depths {depths!r}: give one of the two, such as "
            "--widths 1x,2x,4x,8x"
        )
    axis = "width" if widths else "depth"
    members = _of_widths(cfg.model, widths) if widths else _of_depths(cfg.model, depths)
    torch.set_num_threads(cfg.threads or launch.default_threads(launch.Place.here()))
    how = coordinates.CheckConfig(
        cfg.objective, cfg.optim.model_copy(update={"lr": lr}), cfg.clip, batch, steps, seeds
    )
    sizes, verdicts = coordinates.check(
        members, how, lambda line: print(f"{axis} {line}", file=sys.stderr, flush=True)
    )
    passes = all(verdict.passes for verdict in verdicts)
    folder = out or Path(cfg.run_dir) / "coord-check"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{cfg.parametrisation}-{axis}"
    coordinates.draw_sizes(
        folder / f"{stem}.png",
        sizes,
        verdicts,
        axis,
        f"{path.stem}, {cfg.parametrisation}, lr {lr:g}",
    )
    asked = {"steps": steps, "batch": batch, "lr": lr, "seeds": seeds}
    verdict = {"passes": passes, "limit": coordinates.LIMIT}
    head = record("coord-check", launch.Place.here()) | asked | {f"{axis}s": list(members)}
    slopes = [asdict(one) for one in verdicts]
    found = head | verdict | {"slopes": slopes, "sizes": [asdict(size) for size in sizes]}
    found |= {"config": cfg.model_dump(mode="json"), "command": sys.argv}
    write_whole(folder / f"{stem}.json", json.dumps(found, indent=1))
    brief = {"parametrisation": cfg.parametrisation, f"{axis}s": list(members)} | asked | verdict
    shown = found if as_json else brief | {"picture": str(folder / f"{stem}.png"), "slopes": slopes}
    show(shown, as_json)
    raise typer.Exit(0 if passes else 1)


def _of_widths(model: Any, text: str) -> dict[int, Any]:
    """Members of the config's family by width; `2x` is twice the config's. Raises MupError."""
    from pretrain.models.mup import at_width

    found = {}
    for word in text.split(","):
        times = word.endswith("x")
        number = _number(word.removesuffix("x"), f"--widths {text}: {word!r}")
        width = number * model.width if times else number
        found[round(width)] = at_width(model, round(width), f"--widths {text}: {word}")
    return found


def _of_depths(model: Any, text: str) -> dict[int, Any]:
    found = {}
    for word in text.split(","):
        depth = round(_number(word, f"--depths {text}: {word!r}"))
        if not isinstance(model.depth, int):
            raise config.ConfigError(f"--depths {text}: the depth of a U-DiT is that of its family")
        found[depth] = config.part(type(model), model.model_dump() | {"size": None, "depth": depth})
    return found


def _number(word: str, what: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise config.ConfigError(f"{what} is no number above 0; write such as 1x,2x,4x or 96,192")
    return number
