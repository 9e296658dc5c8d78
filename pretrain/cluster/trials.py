"""Trials of a search as a job array: slurm/mup_sweep.sh trains one a line of OUT/points.txt.

While that file is there the sweep is Slurm's: nothing of it is trained elsewhere.
"""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.manifest import write_whole
from pretrain.tune_search import TuneError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "mup_sweep.sh"
POINTS, NOTE = "points.txt", "slurm.json"
LIMIT = 60.0  # seconds that Slurm gets to answer


def handed_over(out: Path) -> bool:
    return (out / POINTS).is_file()


def hand_over(
    path: Path, overrides: Sequence[str], trials: Mapping[str, Sequence[str]], out: Path
) -> str:
    """Writes the file of trials and submits it; what became of that, in a sentence.

    trials: key=value by name. Raises TuneError if an array of this sweep is still in line, which
    would read the new file, or if sbatch refuses.
    """
    note = out / NOTE
    job = json.loads(note.read_text())["job"] if note.is_file() else None
    if job is not None and _in_line(job):
        raise TuneError(
            f"job {job} of {out} has not ended; wait for it (squeue -j {job}), or scancel it"
        )
    out.mkdir(parents=True, exist_ok=True)
    lines = [" ".join((name, *words)) for name, words in trials.items()]
    write_whole(out / POINTS, "\n".join(lines) + "\n")
    logs = str(out).replace("%", "%%")
    words = ["sbatch", f"--array=1-{len(lines)}", f"--output={logs}/%x-%A_%a.out"]
    words += [os.path.relpath(SCRIPT), f"config={path}"]
    words += [f"points={out / POINTS}", f"run_dir={out}", *overrides]
    shown = shlex.join(words)
    if Path.cwd() != ROOT:
        shown = f"PRETRAIN_ROOT={shlex.quote(str(ROOT))} {shown}"
    if shutil.which("sbatch") is None:  # why: the file stays, the line below reads it
        return f"there is no sbatch on this machine; from a login node, in {Path.cwd()}:\n{shown}"
    done = _ask([words[0], "--parsable", *words[1:]])
    if done.returncode:
        (out / POINTS).unlink()  # why: what is not Slurm's may be trained here
        raise TuneError(f"sbatch refused {shown}\n{done.stderr.strip()}")
    number = done.stdout.strip().partition(";")[0]
    write_whole(note, json.dumps({"job": number, "command": shown}))
    return f"job {number}, {len(lines)} trials: {shown}"


def _in_line(job: str) -> bool:
    """Whether Slurm has it pending or running; a machine that cannot ask has none."""
    if shutil.which("squeue") is None:
        return False
    answer = _ask(["squeue", "-h", "-j", job])
    if answer.returncode and "Invalid job id" not in answer.stderr:  # which is one long gone
        raise TuneError(f"squeue -j {job}: {answer.stderr.strip()}; try again when it answers")
    return answer.returncode == 0 and bool(answer.stdout.strip())


def _ask(words: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Raises TuneError if there is no answer."""
    env = os.environ | {"PRETRAIN_ROOT": str(ROOT)}
    try:
        return subprocess.run(
            words, env=env, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        raise TuneError(f"{words[0]} gave no answer in {LIMIT:.0f} s; try again") from None
