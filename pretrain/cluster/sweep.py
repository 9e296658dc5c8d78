"""What became of a sweep: a row a trial, best first. It starts nothing: slurm/mup_sweep.sh does.

python -m pretrain.cluster.sweep POINTS RUN_DIR       prints them and writes RUN_DIR/results.json
"""

import json
import re
import string
import sys
from pathlib import Path
from typing import Any

from pretrain.cluster import status
from pretrain.manifest import write_whole
from pretrain.showing import show

RESULTS = "results.json"


class SweepError(ValueError):
    """A file of trials that cannot be read as one."""


def points(file: Path) -> dict[str, list[str]]:
    """Overrides by name of trial: lines NAME key=value …, empty ones and comments left out.

    Raises SweepError.
    """
    if not file.is_file():
        raise SweepError(f"{file} is no file; give one with a line NAME key=value … for each trial")
    # why: lines and words end where they do for the shell that starts the trials.
    lines = [line.strip(string.whitespace) for line in file.read_text().split("\n")]
    trials = [re.split("[ \t]+", line) for line in lines if line and not line.startswith("#")]
    if len({words[0] for words in trials}) < len(trials):
        raise SweepError(f"{file} has two trials of one name; give each its own")
    return {words[0]: words[1:] for words in trials}


def results(trials: dict[str, list[str]], folder: Path) -> list[dict[str, Any]]:
    """A row a trial, the lowest final loss first; those without one last."""
    begun = [folder / name for name in trials if (folder / name).is_dir()]
    known = {row["run"]: row for row in status.rows(begun)} if begun else {}
    nothing = {"state": "never started", "step": 0, "steps": None, "loss": None}
    rows = [
        {"name": name, "overrides": overrides}
        | {key: known.get(str(folder / name), nothing)[key] for key in nothing}
        for name, overrides in trials.items()
    ]
    return sorted(rows, key=lambda row: (row["loss"] is None, row["loss"] or 0.0))


def main(words: list[str]) -> None:
    """Print the table and leave it as JSON."""
    if len(words) != 2:
        raise SweepError("expected two arguments: the file of trials and the directory of the runs")
    file, folder = map(Path, words)
    rows = results(points(file), folder)
    shown = [row | {"overrides": " ".join(row["overrides"])} for row in rows]
    show({"trials": shown}, as_json=False)
    write_whole(folder / RESULTS, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (SweepError, status.StatusError) as error:
        print(f"pretrain: {error}", file=sys.stderr)
        sys.exit(2)
