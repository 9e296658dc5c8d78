"""`pretrain submit`: a configuration to a Slurm job: checked, planned, written out, submitted.

The shipped script of the configuration (slurm/*.sh) is resolved: its #SBATCH lines take what the
command line says, and it runs a copy of the code as it is now, whatever happens to the checkout
while the job waits.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from pretrain import config, preflight, run
from pretrain.cluster import site
from pretrain.config import Config
from pretrain.planning import planned

ROOT = Path(__file__).resolve().parents[2]
CODE = ("pretrain", "parallel", "data_pipeline", "configs", "slurm", "pyproject.toml")
GENERAL = "udit_xl_moe.sh"  # for a configuration that has no script of its own
SHOWN = ("params_total", "params_active", "ranks", "micro_batch", "fits_memory", "step_seconds")
SHOWN += ("hours", "gpu_hours", "hours_basis", "warnings")


class SubmitError(ValueError):
    """A job that cannot be submitted from here."""


@dataclass(frozen=True)
class Job:
    """A job that is ready to go. `script` is its text, `folder` where code and script will lie."""

    cfg: Config
    script: str
    folder: Path
    plan: dict[str, Any]
    remarks: tuple[str, ...]


def prepare(
    path: Path,
    overrides: Sequence[str],
    *,
    nodes: int,
    gpus_per_node: int,
    options: Sequence[str] = (),
    exclude_bad: bool = False,
    device: str = "h100",
) -> Job:
    """Checks and resolves; writes nothing.

    options: further options of sbatch, `--time=4:00:00`. device: that of the plan; with cpu the
    job asks for no GPUs, gpus_per_node are ranks. Raises SubmitError and what preflight raises,
    save for data that this machine does not see, which is a remark.
    """
    if nodes < 1 or gpus_per_node < 1:
        raise SubmitError(
            f"{nodes} nodes with {gpus_per_node} ranks each: expected at least 1 of both; without "
            "GPUs use --device cpu, where --gpus-per-node is the number of ranks a node"
        )
    cfg = config.load(path, list(overrides))
    remarks = []
    try:
        preflight.preflight(cfg, nodes * gpus_per_node)
    except DataError as error:
        remarks.append(f"the data is not as it should be, seen from here: {error}")
    everything = planned.of(cfg, nodes * gpus_per_node, device)
    plan = {name: everything[name] for name in SHOWN if name in everything}
    plan["per_rank_gb"] = round(everything["per_rank"]["total"] / 1e9, 1)
    if plan.get("fits_memory") is False:
        remarks.append(f"by the plan this does not fit a {device}; see `pretrain plan`")
    bad, broken = bad_nodes()
    if bad and exclude_bad:
        options = (*options, f"--exclude={','.join(bad)}")
    remarks += [f"{name}: {why}{'; left out' if exclude_bad else ''}" for name, why in bad.items()]
    remarks += broken
    place = Path(cfg.run_dir).absolute()
    folder = place / "code" / f"{datetime.now():%Y%m%d-%H%M%S-%f}"
    script = resolve(
        _script(path).read_text(),
        folder,
        [f"run_dir={place}", *(o for o in overrides if not _is_place(o))],
        {
            "job-name": place.name,
            "nodes": str(nodes),
            "gpus-per-node": None if device == "cpu" else str(gpus_per_node),
            "output": f"{place}/logs/".replace("%", "%%") + "%x-%j.out",
            "chdir": str(Path.cwd()),
        },
        options,
        {"GPUS_PER_NODE": str(gpus_per_node)} if device == "cpu" else {},
    )
    return Job(cfg, script, folder, plan, tuple(remarks))


def _is_place(override: str) -> bool:
    return override.startswith("run_dir=")


def _script(path: Path) -> Path:
    """The shipped script that is made for this configuration, or the general one."""
    for script in sorted((ROOT / "slurm").glob("*.sh")):
        lines = script.read_text().splitlines()
        if f'settings configs/{path.name} "$@"' in lines and "train_until_done" in lines:
            return script
    return ROOT / "slurm" / GENERAL


def resolve(
    text: str,
    folder: Path,
    words: Sequence[str],
    known: Mapping[str, str | None],
    options: Sequence[str],
    exported: Mapping[str, str],
) -> str:
    """The script with its #SBATCH lines set, its code, environment and arguments written in.

    known and options replace lines of the same name, None takes them out; those that have none are
    added after the last. Raises SubmitError for an option that is not --name or --name=value.
    """
    for option in options:
        match = re.fullmatch(r"--([a-z][a-z-]*)(?:=(\S.*))?", option)
        if match is None:
            raise SubmitError(
                f"sbatch option {option!r}: expected --name=value, such as --time=8:00:00"
            )
        if match[1] in ("nodes", "gpus-per-node"):
            raise SubmitError(
                f"sbatch option {option!r}: the plan needs it too; give it without --option"
            )
        known = {**known, match[1]: match[2] or ""}
    lines, left = [], dict(known)
    for line in text.splitlines():
        match = re.match(r"#SBATCH --([a-z-]+)", line)
        lines += _line(match[1], left.pop(match[1])) if match and match[1] in left else [line]
    variables = {"PRETRAIN_ROOT": str(ROOT), "PRETRAIN_CODE": str(folder), **exported}
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH "))
    lines[last + 1 : last + 1] = [
        *(line for name, value in left.items() for line in _line(name, value)),
        "",
        "# Written by `pretrain submit`.",
        "export " + " ".join(f"{n}={shlex.quote(v)}" for n, v in variables.items()),
        f"set -- {shlex.join(words)}",
    ]
    here = 'source "${PRETRAIN_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"'
    return "\n".join(lines).replace(here, 'source "$PRETRAIN_CODE/slurm/lib.sh"') + "\n"


def _line(name: str, value: str | None) -> list[str]:
    """The line of an option as sbatch reads it, which takes quotes and backslashes; none for None.

    Raises SubmitError for a value of more than one line.
    """
    if value is None:
        return []
    if not value.isprintable():
        raise SubmitError(f"--{name}={value!r}: sbatch takes no such characters; choose others")
    if re.search(r"[^\w@%+=:,./\[\]-]", value):
        value = '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return [f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"]


def submit(job: Job, path: Path) -> str:
    """Copies the code, writes the script, gives it to sbatch; the number of the job.

    Raises SubmitError if there is no sbatch here, if it refuses, or if the folder is another job's.
    """
    if shutil.which("sbatch") is None:
        raise SubmitError(
            "there is no sbatch on this machine; submit from a login node, or use --dry-run"
        )
    try:
        job.folder.mkdir(parents=True)
    except FileExistsError as error:
        raise SubmitError(f"{job.folder} is another submission's; submit again") from error
    for name in CODE:
        source, target = ROOT / name, job.folder / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    shutil.copy(path, job.folder / "submitted.yaml")
    (job.folder / run.COMMIT).write_text(run.commit() or "")
    (Path(job.cfg.run_dir) / "logs").mkdir(exist_ok=True)
    script = job.folder / "job.sh"
    script.write_text(job.script)
    words = ["sbatch", "--parsable", str(script)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SubmitError(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def bad_nodes() -> tuple[dict[str, str], list[str]]:
    """Nodes that failed a health check, and what it was; remarks on lines that are broken.

    A line goes once its node is repaired.
    """
    file = site.folder() / "bad_nodes.jsonl"
    found: dict[str, str] = {}
    broken = []
    text = file.read_text(errors="replace") if file.is_file() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
            since = datetime.fromtimestamp(record["time"]).isoformat(sep=" ", timespec="minutes")
            node = str(record["node"])
            found[node] = f"failed check '{record['check']}' on {since}: {record['why']}"
        except (ValueError, KeyError, TypeError, OverflowError, OSError):
            broken.append(f"{file} has a broken line, which is left out: {line!r}")
    return found, broken
