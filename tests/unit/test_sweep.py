"""A sweep's results: every trial of the file has a row, the best first."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from pretrain.cluster.sweep import SweepError, main, points, results


def trial(folder: Path, losses: list[float | None], *, done: bool) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("steps: 40\n")
    lines = [json.dumps({"step": i + 1, "loss": loss}) for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if done:
        (folder / "done").write_text(str(len(losses)))


@pytest.fixture
def sweep(tmp_path: Path) -> tuple[Path, Path]:
    file, folder = tmp_path / "sweep.txt", tmp_path / "runs"
    file.write_text("# lr\nhigh optim.lr=1 seed=2\n\n  low optim.lr=0.1\nnan optim.lr=9\nnever\n")
    trial(folder / "high", [9.0] * 36 + [2.0, 3.0, 4.0, 5.0], done=True)
    trial(folder / "low", [9.0] * 36 + [1.0, 2.0, 3.0, 4.0], done=True)
    trial(folder / "nan", [9.0] * 19 + [None], done=False)
    return file, folder


def test_points_are_named_lines(sweep: tuple[Path, Path], tmp_path: Path) -> None:
    assert points(sweep[0]) == {
        "high": ["optim.lr=1", "seed=2"],
        "low": ["optim.lr=0.1"],
        "nan": ["optim.lr=9"],
        "never": [],
    }
    (tmp_path / "two.txt").write_text("a x=1\na x=2\n")
    with pytest.raises(SweepError, match="two trials of one name"):
        points(tmp_path / "two.txt")
    with pytest.raises(SweepError, match="is no file"):
        points(tmp_path / "none.txt")


def test_the_shell_reads_the_same_trials(tmp_path: Path) -> None:
    script = (Path(__file__).parents[2] / "slurm" / "mup_sweep.sh").read_text()
    (sed,) = re.findall(r"< <\((sed .*) \"\$kept\"\)", script)
    file = tmp_path / "points.txt"
    odd = "c x=1\u2028d\x0ce\n\x0c\n"  # ends of lines to Python alone
    file.write_text(f"# lr\n\na x=1 y=2\n \t\n  # no\n\t b\tx=2 \n#\n{odd}last")
    words = """while read -ra words; do printf '%s|' "${words[@]}"; echo; done"""
    shell = f'{{ {sed} "$1"; echo; }} | {words}'
    done = subprocess.run(["bash", "-c", shell, "", file], capture_output=True, text=True)
    trials = points(file)
    assert list(trials) == ["a", "b", "c", "last"]
    assert done.stdout == "".join("|".join((name, *trials[name])) + "|\n" for name in trials)


def test_the_best_trial_is_first_and_none_is_left_out(sweep: tuple[Path, Path]) -> None:
    rows = results(points(sweep[0]), sweep[1])
    assert [(row["name"], row["loss"]) for row in rows] == [
        ("low", 2.5),
        ("high", 3.5),
        ("nan", None),
        ("never", None),
    ]
    assert [row["state"] for row in rows[:2]] == ["done", "done"]
    assert rows[3] == {
        "name": "never",
        "overrides": [],
        "state": "never started",
        "step": 0,
        "steps": None,
        "loss": None,
    }
    assert (rows[1]["step"], rows[1]["steps"], rows[1]["overrides"]) == (
        40,
        40,
        ["optim.lr=1", "seed=2"],
    )


def test_the_table_is_printed_and_kept_as_json(
    sweep: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(part) for part in sweep])
    assert "optim.lr=0.1" in capsys.readouterr().out
    rows = json.loads((sweep[1] / "results.json").read_text())
    assert [row["name"] for row in rows] == ["low", "high", "nan", "never"]
    with pytest.raises(SweepError, match="two arguments"):
        main([])
