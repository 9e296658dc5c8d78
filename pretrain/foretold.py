"""What the plan said of a run, held against it: a line of its log, and what would have fitted."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from parallel.chips import CHIPS
from pretrain.config import Config
from pretrain.planning import compare, planned

LESS = 0.9  # of the memory that a run was planned with
RECORD = 2  # of a life; the first has what is made at first use in it


class Foretold:
    """Made before anything is assembled, so that what a process grows by is the run's."""

    def __init__(self, cfg: Config, world: int, device: torch.device) -> None:
        self._prediction = planned.prediction(cfg, world, device)
        self._seen, self._records = compare.Resident(device), 0
        cpu = device.type == "cpu"
        self._note = "; on a CPU memory is what the process grew by, libraries too" if cpu else ""

    def compare(self, values: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Says once, with the second record of metrics, how far the plan was off."""
        self._records += bool(values)
        if values and self._records == RECORD:
            say(self._prediction.line(self._seen.peak(), values["step_time"]) + self._note)


def fitting(cfg: Config, world: int, chip: str | None = None) -> str:
    """What would fit the memory of a chip of the table (None: of this device), in a sentence."""
    if chip is None:
        chip = planned.name_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if chip not in CHIPS:
        return (
            "Nothing is known of this device's memory: a larger accum, remat.mode=full, or more "
            "ranks that share the weights need less."
        )
    now, found = planned.searched(cfg, world, chip)
    if found.nothing_fits is not None:
        return f"By the plan, {found.nothing_fits}."
    # why: what is configured has just been seen not to fit, whatever the plan says of it.
    less = [one for one in found.proposals if one.memory < LESS * now]
    if not less:
        return (
            f"By the plan {now / 1e9:.1f} GB are needed, and no layout of {world} ranks that is "
            "nearly as fast needs much less; raise accum, set remat.mode=full, or add ranks."
        )
    said = "; ".join(f"{one.words} ({one.memory / 1e9:.1f} GB)" for one in less)
    return f"By the plan {now / 1e9:.1f} GB are needed; less would be, fastest first: {said}."
