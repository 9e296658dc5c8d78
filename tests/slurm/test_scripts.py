"""The shipped scripts as they are: clean shell, accepted by Slurm on nodes of eight GPUs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT

SCRIPTS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if path.name != "lib.sh")
TRAINING = ("udit_xl_moe", "dit_moe_xl", "udit_l", "mup_sweep")


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        assert not os.environ.get("REQUIRE_SLURM"), "shellcheck is not installed"
        pytest.skip("shellcheck is not installed: apt-get install -y shellcheck")
    words = ["shellcheck", *map(str, sorted((ROOT / "slurm").glob("*.sh")))]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_slurm_takes_a_script_as_shipped(script: Path, cluster: Cluster) -> None:
    cluster.run("sbatch", "--test-only", str(script), cwd=ROOT)


@pytest.mark.parametrize("change", ["--gpus-per-node=9", "--nodes=4", "--partition=none"])
def test_slurm_would_have_refused(change: str, cluster: Cluster) -> None:
    with pytest.raises(AssertionError, match="sbatch"):
        cluster.run("sbatch", "--test-only", change, "slurm/udit_xl_moe.sh", cwd=ROOT)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_says_what_it_does(script: Path) -> None:
    """A header with its command; a log that says which life of which job; one library."""
    text = script.read_text()
    header = text.split("#SBATCH")[0]
    assert f"sbatch slurm/{script.name}" in header or f"slurm/{script.name}" in header
    assert re.search(r"#SBATCH --output=%x-%(j|A_%a)\.out\n", text)
    assert "#SBATCH --requeue\n" in text
    assert "#SBATCH --open-mode=append\n" in text
    assert 'source "${PRETRAIN_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"' in text
    if script.stem in TRAINING:
        assert "#SBATCH --signal=B:USR1@300\n" in text
        assert "train_until_done" in text


def test_both_halves_of_the_signal_contract_say_so() -> None:
    assert "pretrain/run.py" in (ROOT / "slurm" / "lib.sh").read_text()
    assert "slurm/lib.sh" in (ROOT / "pretrain" / "run.py").read_text()
