"""`pretrain submit` and `status`: jobs on a Slurm cluster."""

from pathlib import Path
from typing import Annotated

import typer

from pretrain.showing import AsJson, show

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]


def submit(
    path: ConfigPath,
    nodes: Annotated[int, typer.Option()],
    overrides: Overrides = None,
    gpus_per_node: Annotated[int, typer.Option(help="Ranks a node.")] = 8,
    account: Annotated[str | None, typer.Option()] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    time: Annotated[str | None, typer.Option(help="Limit of one life, 24:00:00.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Any other of sbatch: --option=--qos=high")
    ] = None,
    exclude_bad: Annotated[
        bool, typer.Option("--exclude-bad", help="Leave out nodes that failed a health check.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="h100 | h200 | cpu, which asks for no GPUs.")
    ] = "h100",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print it; do nothing.")] = False,
) -> None:
    """Check and plan a run, write its sbatch script, submit it."""
    from pretrain.cluster import submit as submitting

    named = {"account": account, "partition": partition, "time": time}
    job = submitting.prepare(
        path,
        overrides or [],
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        options=[*(f"--{n}={v}" for n, v in named.items() if v), *(option or [])],
        exclude_bad=exclude_bad,
        device=device,
    )
    if dry_run:
        print(job.script)
    show(job.plan, as_json=False)
    for remark in job.remarks:
        print(f"note: {remark}")
    if dry_run:
        print(f"nothing was submitted; code and script would be in {job.folder}")
        return
    number = submitting.submit(job, path)
    print(f"job {number}: {job.folder}/job.sh\nlook at it with: pretrain status {job.cfg.run_dir}")


def status(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...")], as_json: AsJson = False
) -> None:
    """How runs stand: step, rate, time left, restarts, last error, and where the hours went."""
    from pretrain.cluster import status as states

    show(states.of(runs[0]) if len(runs) == 1 else {"runs": states.rows(runs)}, as_json)
