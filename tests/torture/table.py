"""`make torture`: runs that are hurt and restarted, and what came of them, as a table.

    python -m tests.torture.table [--seed 0] [--only SIGTERM,…] [--skip-matrix]

Ends with 1 if a run was lost, a digest differs, or a sample was lost or seen twice.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_pipeline.encode import encode
from tests.torture import matrix
from tests.torture.cases import Case, drawn
from tests.torture.harness import Bench, Outcome, may_mount

COLUMNS = ("hurt", "moment", "layout → layout", "exit codes", "steps lost", "end", "samples", "s")


def row(case: Case, outcome: Outcome) -> tuple[str, ...]:
    codes = " · ".join(",".join(map(str, codes)) for codes in outcome.codes)
    lost = "" if outcome.lost is None else str(outcome.lost)
    end = outcome.equal if not outcome.wrong else f"RED {outcome.equal}"
    layouts = case.start.name if case.same else f"{case.start.name} → {case.then.name}"
    seconds = f"{outcome.seconds:.0f}"
    return (case.name, outcome.moment, layouts, codes, lost, end, outcome.samples, seconds)


def main() -> int:
    os.environ["WANDB_MODE"] = "disabled"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--skip-matrix", action="store_true")
    chosen = parser.parse_args()
    wanted = [word for word in chosen.only.split(",") if word]
    cases = [c for c in drawn(chosen.seed) if not wanted or any(w in c.name for w in wanted)]
    console, table = Console(width=190), Table(*COLUMNS, title="hurt and restarted")
    red, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        folder = Path(name)
        encode("digits", folder / "digits", codec="haar2")
        bench = Bench(folder / "digits", folder, chosen.seed)
        if not may_mount(folder):
            print("no disk of its own: this user may not mount one; those runs are left out")
            cases = [case for case in cases if not case.disk]
        for case in cases:
            outcome = bench.torture(case)
            table.add_row(*row(case, outcome))
            print(*row(case, outcome), sep="  |  ", flush=True)
            if outcome.wrong:
                red += 1
                print("RED:", *outcome.wrong, sep="\n", flush=True)
    console.print(table)
    console.print(f"{len(cases)} runs, {red} red, {time.monotonic() - began:.0f} s")
    if not chosen.skip_matrix and not wanted:
        red += matrix.main([])
    return int(red > 0)


if __name__ == "__main__":
    sys.exit(main())
