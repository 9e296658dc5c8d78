"""What slurm/lib.sh decides, without a Slurm: whom a health check blames, what a crash was."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def shell(folder: Path, script: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs a script that has sourced the library, as job 7 on the nodes a, b and c."""
    before = f"""
        source {ROOT}/slurm/lib.sh
        HOSTS=(a b c) NODES=3 RANKS_PER_NODE=2 LOGS={folder}/logs RUN_DIR={folder} FROM=-1
        REPORT=$LOGS/7.0-health ATTEMPTS=$RUN_DIR/attempts.jsonl
        scontrol() {{ echo "x Command=train.sh steps=9 WorkDir=y Reason=None"; }}
        mkdir -p "$REPORT"
    """
    env = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "PATH": "/usr/bin:/bin"}
    env |= {"PRETRAIN_SITE": str(folder / "site")} | settings
    return subprocess.run(
        ["bash", "-c", before + script], env=env, capture_output=True, text=True, check=False
    )


def report(folder: Path, **lines: str | None) -> None:
    """What ranks have left: a0="meet\\tx" is the file of node a's rank 0; None: no file."""
    place = folder / "logs" / "7.0-health"
    place.mkdir(parents=True)
    for number, rank in enumerate(("a0", "a1", "b0", "b1", "c0", "c1")):
        text = lines.get(rank, "")
        if text is not None:
            (place / f"{rank[0]}.rank{number}").write_text(text)


MET = "meet\tthe ranks did not meet: Connection closed by peer\n"
GONE = dict.fromkeys(("a0", "a1", "b0", "b1", "c0", "c1"))


@pytest.mark.parametrize(
    ("left", "blamed"),
    [
        ({"b1": "devices\tseven GPUs\n", "a0": MET, "c0": MET}, ["b"]),
        ({"b0": None, "b1": None, "a0": MET, "c1": MET}, ["b"]),
        ({"c1": None}, ["c"]),
        ({"a0": MET, "b0": MET, "c0": MET}, []),
        (GONE, []),
        (GONE | {"b0": "matrix product\twrong\n"}, ["b"]),
    ],
)
def test_who_is_blamed(left: dict[str, str | None], blamed: list[str], tmp_path: Path) -> None:
    report(tmp_path, **left)
    done = shell(tmp_path, 'blame_nodes 1; echo "nobody"')
    record = tmp_path / "site" / "bad_nodes.jsonl"
    if not blamed:
        assert done.stdout.endswith("nobody\n"), done.stdout + done.stderr
        assert not record.exists()
        return
    assert done.returncode == 1
    assert [json.loads(x)["node"] for x in record.read_text().splitlines()] == blamed
    assert f"sbatch --exclude={','.join(blamed)} --nodes=3 train.sh steps=9\n" in done.stdout


def test_what_all_nodes_share_is_no_nodes_fault(tmp_path: Path) -> None:
    report(tmp_path, **dict.fromkeys(GONE, "disk space\t/fsx has 1 GB free\n"))
    done = shell(tmp_path, "blame_nodes 1")
    assert done.returncode == 1
    assert "what they share" in done.stdout
    assert "--exclude" not in done.stdout
    assert not (tmp_path / "site" / "bad_nodes.jsonl").exists()


def test_any_text_can_be_recorded(tmp_path: Path) -> None:
    report(tmp_path, b0='data\tC:\\x "y" \x1b[0m é\n')
    shell(tmp_path, "blame_nodes 1")
    (line,) = (tmp_path / "site" / "bad_nodes.jsonl").read_text().splitlines()
    assert json.loads(line)["why"] == "C:x 'y' [0m é"


@pytest.mark.parametrize(
    ("said", "begun", "refused"),
    [
        ("pretrain: optim.lrr: no such key\n", None, True),
        ("bash: python: No such file\n", None, False),
        ("pretrain: data.path=x: no such directory\n", 0, False),
        ("pretrain: data.path=x: no such directory\n", 1, True),
    ],
)
def test_wrong_input_is_told_by_its_words(
    said: str, begun: int | None, refused: bool, tmp_path: Path
) -> None:
    """begun: the restart whose training loop has begun; after that it is no input any more."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "7.0-train-rank0.log").write_text("hello\n" + said)
    (tmp_path / "logs" / "7.1-train-rank0.log").write_text("hello\n")
    if begun is not None:
        line = {"event": "begin", "time": 1.0, "step": 0, "world": 2, "job": "7", "restart": begun}
        (tmp_path / "timeline.jsonl").write_text(json.dumps(line) + "\n")
    assert (shell(tmp_path, "refused").returncode == 0) is refused


def test_the_first_words_are_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for rank, (age, text) in enumerate(
        [(0, "Traceback\nConnectionError: peer\n"), (9, "KeyError")]
    ):
        path = tmp_path / "logs" / f"7.0-train-rank{rank}.log"
        path.write_text(text + "\n")
        subprocess.run(["touch", "-d", f"{age} seconds ago", path], check=True)
    assert shell(tmp_path, "first_words").stdout.endswith("KeyError\n")


@pytest.mark.parametrize(
    ("outcomes", "ends"),
    [
        (["crashed"] * 2, False),
        (["crashed"] * 3, True),
        (["crashed", "lost", "crashed"], True),
        (["stopped"] * 9, False),
        (["stopped"] * 10, True),
    ],
)
def test_when_it_gives_up(outcomes: list[str], ends: bool, tmp_path: Path) -> None:
    script = "".join(f"end_attempt {word} 1 because; " for word in outcomes)
    done = shell(tmp_path, script + "unless_stuck; echo goes on")
    assert ("goes on" not in done.stdout) is ends, done.stdout + done.stderr
    assert done.returncode == int(ends)


def test_a_person_who_has_asked_is_not_overruled(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    assert "0" in shell(tmp_path, "ask_to_stop USR1; echo $ASKED").stdout.splitlines()[-1]
    assert (tmp_path / "stop").read_text() == ""


def test_a_signal_in_the_first_moment_is_kept(tmp_path: Path) -> None:
    done = shell(tmp_path, f"kill -USR1 $$; source {ROOT}/slurm/lib.sh; echo $ASKED$TERMED")
    assert done.stdout == "10\n"


def test_nodes_of_unlike_size_share_out_the_fewest_cpus(tmp_path: Path) -> None:
    script = (
        'srun() { printf "%s\n" "$@"; }; CONTAINER=(); CPUS=$(fewest_cpus); tasks 2 log -- true'
    )
    done = shell(tmp_path, script, SLURM_JOB_CPUS_PER_NODE="64(x2),9")
    assert "--cpus-per-task=4" in done.stdout.splitlines()


def test_two_jobs_do_not_train_into_one_run(tmp_path: Path) -> None:
    begin = {"event": "begin", "time": 1.0, "job": "6", "restart": 0, "from": -1}
    (tmp_path / "attempts.jsonl").write_text(json.dumps(begin, separators=(",", ":")) + "\n")
    other = shell(tmp_path, "squeue() { echo 6; }; close_open_attempt")
    assert other.returncode == 2
    assert "job 6 trains into it" in other.stderr
    gone = shell(tmp_path, "squeue() { :; }; close_open_attempt")
    assert gone.returncode == 0
    last = json.loads((tmp_path / "attempts.jsonl").read_text().splitlines()[-1])
    assert (last["outcome"], last["job"]) == ("lost", "6")


@pytest.mark.parametrize("line", ["run_dir: /fsx/x", 'run_dir: "/fsx/x"  # where', "steps: 1"])
def test_a_run_goes_where_the_configuration_says(line: str, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(line + "\n")
    done = shell(tmp_path, f"unset RUN_DIR; settings {config} steps=2; echo $RUN_DIR")
    assert done.stdout == ("/fsx/x\n" if "run_dir" in line else "runs/mine\n")
    given = shell(tmp_path, f"unset RUN_DIR; settings {config} run_dir=/y; echo $RUN_DIR")
    assert given.stdout == "/y\n"


def test_an_unknown_launcher_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = shell(tmp_path, "train_until_done", LAUNCHER="mpirun")
    assert done.returncode == 2
    assert "LAUNCHER=mpirun: expected srun" in done.stderr
    assert not (tmp_path / "attempts.jsonl").exists()
