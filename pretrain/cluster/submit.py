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
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from pretrain import config, planned, preflight, run
from pretrain.cluster import site
from pretrain.config import Config

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

    options: further options of sbatch, `--time=4:00:00`. Raises what preflight raises, save for
    data that this machine does not see, which is a remark.
    """
    cfg = config.load(path, list(overrides))
    remarks = []
    try:
        preflight.preflight(cfg, nodes * gpus_per_node)
    except DataError as error:
        remarks.append(f"the data is not as it should be, seen from here: {error}")
    if cfg.engine == "fsdp2":
        everything = planned.of(cfg, nodes * gpus_per_node, device)
        plan = {name: everything[name] for name in SHOWN if name in everything}
        plan["per_rank_gb"] = round(everything["per_rank"]["total"] / 1e9, 1)
    else:
        plan = {"ranks": nodes * gpus_per_node}
        remarks.append(f"engine={cfg.engine} is not planned: memory and hours are not known")
    if plan.get("fits_memory") is False:
        remarks.append(f"by the plan this does not fit a {device}; see `pretrain plan`")
    bad = bad_nodes()
    if bad and exclude_bad:
        options = (*options, f"--exclude={','.join(bad)}")
    remarks += [f"{name}: {why}{'; left out' if exclude_bad else ''}" for name, why in bad.items()]
    folder = Path(cfg.run_dir).absolute() / "code" / f"{datetime.now():%Y%m%d-%H%M%S}"
    script = resolve(
        _script(path).read_text(),
        folder,
        [f"run_dir={Path(cfg.run_dir).absolute()}", *(o for o in overrides if not _is_place(o))],
        {
            "job-name": Path(cfg.run_dir).name,
            "nodes": str(nodes),
            "gpus-per-node": str(gpus_per_node),
            "output": f"{Path(cfg.run_dir).absolute()}/logs/%x-%j.out",
            "chdir": str(Path.cwd()),
        },
        options,
    )
    return Job(cfg, script, folder, plan, tuple(remarks))


def _is_place(override: str) -> bool:
    return override.startswith("run_dir=")


def _script(path: Path) -> Path:
    """The shipped script that is made for this configuration, or the general one."""
    for script in sorted((ROOT / "slurm").glob("*.sh")):
        if f"settings configs/{path.name} " in script.read_text():
            return script
    return ROOT / "slurm" / GENERAL


def resolve(
    text: str, folder: Path, words: Sequence[str], known: dict[str, str], options: Sequence[str]
) -> str:
    """The script with its #SBATCH lines set, its code and its arguments written in.

    known and options replace lines of the same name; those that have none are added after the last.
    Raises SubmitError for an option that is not --name or --name=value.
    """
    for option in options:
        match = re.fullmatch(r"--([a-z][a-z-]*)(?:=(\S.*))?", option)
        if match is None:
            raise SubmitError(
                f"sbatch option {option!r}: expected --name=value, such as --time=8:00:00"
            )
        known = known | {match[1]: match[2] or ""}
    lines, left = text.splitlines(), dict(known)
    for number, line in enumerate(lines):
        match = re.match(r"#SBATCH --([a-z-]+)", line)
        if match and match[1] in left:
            lines[number] = _line(match[1], left.pop(match[1]))
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH "))
    lines[last + 1 : last + 1] = [
        *(_line(name, value) for name, value in left.items()),
        "",
        "# Written by `pretrain submit`.",
        f"export PRETRAIN_ROOT={shlex.quote(str(ROOT))} PRETRAIN_CODE={shlex.quote(str(folder))}",
        f"set -- {shlex.join(words)}",
    ]
    here = 'source "${PRETRAIN_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"'
    return "\n".join(lines).replace(here, 'source "$PRETRAIN_CODE/slurm/lib.sh"') + "\n"


def _line(name: str, value: str) -> str:
    return f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"


def submit(job: Job, path: Path) -> str:
    """Copies the code, writes the script, gives it to sbatch; the number of the job.

    Raises SubmitError if there is no sbatch here, or if it refuses.
    """
    if shutil.which("sbatch") is None:
        raise SubmitError(
            "there is no sbatch on this machine; submit from a login node, or use --dry-run"
        )
    for name in CODE:
        source, target = ROOT / name, job.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
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


def bad_nodes() -> dict[str, str]:
    """Nodes that failed a health check, and what it was; a line goes once its node is repaired."""
    file = site.folder() / "bad_nodes.jsonl"
    found: dict[str, str] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            record = json.loads(line)
            since = datetime.fromtimestamp(record["time"]).isoformat(sep=" ", timespec="minutes")
            found[record["node"]] = f"failed check '{record['check']}' on {since}: {record['why']}"
        except (ValueError, KeyError, TypeError) as error:
            raise SubmitError(f"{file} has a line that is broken ({error}): {line!r}") from error
    return found
