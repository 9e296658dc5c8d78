"""`pretrain submit`: what the script it writes says; Slurm itself is in tests/slurm."""

import json
import re
import shlex
from pathlib import Path

import pytest

from pretrain.cluster import submit
from pretrain.config import ConfigError
from tests import tiny

TEXT = """#!/bin/bash
# what it does
#SBATCH --job-name=old
#SBATCH --nodes=2
#SBATCH --exclusive

# shellcheck source=slurm/lib.sh
source "${PRETRAIN_ROOT:-$SLURM_SUBMIT_DIR}/slurm/lib.sh"

settings configs/udit_xl_moe.yaml "$@"
"""

BAD = {"time": 1.7e9, "node": "node7", "check": "disk space", "why": "full", "job": "3"}


def test_options_replace_lines_and_new_ones_follow_the_last() -> None:
    known = {"nodes": "4", "job-name": "mine"}
    script = submit.resolve(
        TEXT, Path("/r/code/1"), ["steps=5"], known, ["--qos=high", "--hold"], {}
    )
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert lines == [
        "#SBATCH --job-name=mine",
        "#SBATCH --nodes=4",
        "#SBATCH --exclusive",
        "#SBATCH --qos=high",
        "#SBATCH --hold",
    ]
    assert "set -- steps=5\n" in script
    assert 'source "$PRETRAIN_CODE/slurm/lib.sh"' in script


def test_an_argument_with_blanks_stays_one() -> None:
    script = submit.resolve(TEXT, Path("/r"), ["run_dir=/a b", "ema.power=[0.1, 0.2]"], {}, [], {})
    assert "set -- 'run_dir=/a b' 'ema.power=[0.1, 0.2]'\n" in script


@pytest.mark.parametrize("option", ["qos=high", "-p main", "--time=", "--a;b=1"])
def test_an_option_that_is_none_is_refused(option: str) -> None:
    with pytest.raises(submit.SubmitError, match="expected --name=value"):
        submit.resolve(TEXT, Path("/r"), [], {}, [option], {})


def test_what_the_plan_needs_is_no_option_of_sbatch_alone() -> None:
    with pytest.raises(submit.SubmitError, match="the plan needs it too"):
        submit.resolve(TEXT, Path("/r"), [], {}, ["--nodes=4"], {})


def test_a_job_is_planned_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETRAIN_SITE", str(tmp_path / "site"))
    path = tiny.write(tmp_path, "udit-moe", tmp_path / "nothing", mesh__ep=2)
    before = sorted(tmp_path.rglob("*"))
    job = submit.prepare(path, ["steps=7"], nodes=2, gpus_per_node=2)
    assert job.plan["ranks"] == 4
    assert job.plan["hours"] > 0
    assert job.plan["gpu_hours"] == pytest.approx(4 * job.plan["hours"])
    assert any("does not exist" in remark for remark in job.remarks)  # the data
    assert "steps=7" in job.script
    assert f"run_dir={tmp_path}/run" in job.script
    assert sorted(tmp_path.rglob("*")) == before


def test_a_wrong_run_is_refused_before_it_waits_in_a_queue(tmp_path: Path) -> None:
    path = tiny.write(tmp_path, "dit", tmp_path / "nothing")
    with pytest.raises(ConfigError, match="global_batch"):
        submit.prepare(path, ["data.global_batch=7"], nodes=2, gpus_per_node=2)


def test_bad_nodes_are_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRAIN_SITE", str(tmp_path))
    (tmp_path / "bad_nodes.jsonl").write_text(json.dumps(BAD) + "\n")
    path = tiny.write(tmp_path, "dit", tmp_path / "nothing")
    named = submit.prepare(path, [], nodes=1, gpus_per_node=1)
    left_out = submit.prepare(path, [], nodes=1, gpus_per_node=1, exclude_bad=True)
    assert "--exclude" not in named.script
    assert any("node7" in remark and "disk space" in remark for remark in named.remarks)
    assert "#SBATCH --exclude=node7\n" in left_out.script


@pytest.mark.parametrize(
    "line",
    [
        '{"node": "node7"}',
        '{"time": 1.7e9, "node": "no',
        "[1, 2]",
        '{"time": 1e30, "node": "node7", "check": "a", "why": "b"}',
    ],
)
def test_a_broken_record_of_bad_nodes_is_said_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setenv("PRETRAIN_SITE", str(tmp_path))
    (tmp_path / "bad_nodes.jsonl").write_text(f"{line}\n{json.dumps(BAD | {'node': 'node8'})}\n")
    path = tiny.write(tmp_path, "dit", tmp_path / "nothing")
    job = submit.prepare(path, [], nodes=1, gpus_per_node=1, exclude_bad=True)
    assert "#SBATCH --exclude=node8\n" in job.script
    assert any("broken line" in remark and repr(line) in remark for remark in job.remarks)


@pytest.mark.parametrize("path", sorted((submit.ROOT / "configs").glob("*.yaml")), ids=str)
def test_a_config_gets_its_own_script_or_the_general_one(path: Path) -> None:
    own = {
        "udit_l_in256": "udit_l.sh",
        "dit_moe_xl_in256": "dit_moe_xl.sh",
        "udit_xl_moe": "udit_xl_moe.sh",
    }
    assert submit._script(path).name == own.get(path.stem, submit.GENERAL)


@pytest.mark.parametrize(("nodes", "gpus_per_node"), [(0, 8), (1, 0), (1, -8)])
def test_nothing_to_run_on_is_refused(tmp_path: Path, nodes: int, gpus_per_node: int) -> None:
    path = tiny.write(tmp_path, "dit", tmp_path / "nothing")
    with pytest.raises(submit.SubmitError, match="at least 1"):
        submit.prepare(path, [], nodes=nodes, gpus_per_node=gpus_per_node)


def test_a_cluster_without_gpus_is_asked_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETRAIN_SITE", str(tmp_path / "site"))
    path = tiny.write(tmp_path, "dit", tmp_path / "nothing")
    job = submit.prepare(path, [], nodes=1, gpus_per_node=4, device="cpu")
    assert "--gpus" not in job.script
    assert " GPUS_PER_NODE=4\n" in job.script
    job = submit.prepare(path, [], nodes=1, gpus_per_node=4)
    assert "#SBATCH --gpus-per-node=4\n" in job.script
    assert " GPUS_PER_NODE=4" not in job.script


def test_a_directory_with_blanks_reaches_sbatch_in_quotes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch reads quotes and backslashes as a shell does; % is its own."""
    monkeypatch.setenv("PRETRAIN_SITE", str(tmp_path / "site"))
    path = tiny.write(tmp_path, "dit", tmp_path / "nothing")
    run = tmp_path / 'a "b" 5%'
    script = submit.prepare(path, [f"run_dir='{run}'"], nodes=1, gpus_per_node=1).script
    said = dict(
        shlex.split(line)[1].removeprefix("--").partition("=")[::2]
        for line in script.splitlines()
        if line.startswith("#SBATCH")
    )
    assert said["job-name"] == run.name
    assert said["output"] == f'{tmp_path}/a "b" 5%%/logs/%x-%j.out'
    with pytest.raises(submit.SubmitError, match="characters"):
        submit.resolve(TEXT, Path("/r"), [], {"chdir": "a\nb"}, [], {})


def test_two_submissions_never_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETRAIN_SITE", str(tmp_path / "site"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 17\n")
    (tmp_path / "sbatch").chmod(0o755)
    path = tiny.write(tmp_path, "dit", tmp_path / "nothing")
    first, second = (submit.prepare(path, [], nodes=1, gpus_per_node=1) for _ in range(2))
    assert [submit.submit(job, path) for job in (first, second)] == ["17", "17"]
    scripts = [(job.folder / "job.sh").read_text() for job in (first, second)]
    assert scripts == [first.script, second.script]
    assert first.folder != second.folder
    with pytest.raises(submit.SubmitError, match="submit again"):
        submit.submit(first, path)


def test_both_ways_to_submit_copy_the_same_code() -> None:
    text = (submit.ROOT / "slurm" / "lib.sh").read_text()
    (listed,) = re.findall(r'tar -C "\$ROOT" -c ([a-z_. ]+)', text)
    assert tuple(listed.split()) == submit.CODE
