"""`pretrain tune` without training: what is tried, what a run directory tells, what is written."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from pretrain import cli, config, preflight, tune_report, tune_target
from pretrain.cluster import sweep as collecting
from pretrain.cluster import trials
from pretrain.config import ConfigError
from pretrain.models.mup import MupError
from pretrain.planning import planned
from pretrain.run import RunError
from pretrain.tune import Search, Sweep
from pretrain.tune_outcome import Outcome, outcome_of
from pretrain.tune_search import TuneError, drawn, grid, name, ranked, space, verdict
from tests import tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("log:2^-9..2^-6", (2**-9, 2**-8, 2**-7, 2**-6)),
        ("log:1e-3..4e-3", (1e-3, 2e-3, 4e-3)),
        ("log:1e-4..1e-2:3", (1e-4, 1e-3, 1e-2)),
        ("log:32..128", (32, 64, 128)),
        ("lin:0..1:5", (0, 0.25, 0.5, 0.75, 1)),
        ("lin:-1.5..0.5:2", (-1.5, 0.5)),
        ("3,1e-3,2^-4", (3, 1e-3, 2**-4)),
        ("cosine,wsd", ("cosine", "wsd")),
    ],
)
def test_a_space_is_read(text: str, values: tuple[float, ...]) -> None:
    found = space(f"optim.lr={text}")
    assert found.key == "optim.lr"
    assert list(map(str, found.values)) == [str(value) for value in values]


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("optim.lr", "is not KEY=SPACE"),
        ("=1,2", "is not KEY=SPACE"),
        ("lr=log:0..1", "log of 0"),
        ("lr=log:-1..1", "log of -1"),
        ("lr=log:2..1", "must end above it"),
        ("lr=log:1..3", "end at 4, or"),
        ("lr=log:1-3", "is no range"),
        ("lr=log:a..2", "'a' is no number"),
        ("lr=log:1..2:1", "at least 2"),
        ("lr=log:1..inf", "'inf' is no number"),
        ("lr=lin:0..1", "write lin:0..1:5"),
        ("lr=1,1.0", "a value is there twice"),
        ("lr=1,,2", "'' in a list"),
    ],
)
def test_what_is_no_space_is_refused(word: str, why: str) -> None:
    with pytest.raises(TuneError, match=re.escape(why)):
        space(word)


def test_a_grid_is_whole_and_begins_coarse() -> None:
    spaces = [space("a=log:1..64"), space("b=x,y")]
    assert len(set(grid(spaces))) == len(grid(spaces)) == 14
    firsts = [value for (value,) in grid(spaces[:1])][:4]
    assert max(firsts) / min(firsts) >= 16


def test_a_draw_has_an_address() -> None:
    spaces = [space("a=log:1e-4..1e-1", grid=False), space("b=lin:0..1", grid=False)]
    assert drawn(spaces, 20, seed=1)[:5] == drawn(spaces, 5, seed=1)
    assert [p[1] for p in drawn(spaces, 5, seed=1)] == [p[0] for p in drawn(spaces[1:], 5, seed=1)]
    assert drawn(spaces, 5, seed=2) != drawn(spaces, 5, seed=1)
    logs = [math.log10(a) for a, _ in drawn(spaces, 300, seed=0) if isinstance(a, float)]
    assert all(-4 <= value <= -1 for value in logs)
    assert sum(logs) / len(logs) == pytest.approx(-2.5, abs=0.2)
    with pytest.raises(TuneError, match="leave :4 out"):
        space("a=lin:0..1:4", grid=False)


def test_names_are_legal_and_state_the_values() -> None:
    script = (ROOT / "slurm" / "mup_sweep.sh").read_text()
    (legal,) = re.findall(r"words\[0\]\} =~ \^(\S+)\$ ", script)
    spaces = [space("optim.lr=2^-9,1e9"), space("schedule.kind=a/b,c")]
    found = [name(24, spaces, point, 3) for point in grid(spaces)]
    assert set(found) == {
        "w24-lr0.00195312-kinda_b-s3",
        "w24-lr1e+09-kinda_b-s3",
        "w24-lr0.00195312-kindc-s3",
        "w24-lr1e+09-kindc-s3",
    }
    assert all(re.fullmatch(legal, word) for word in found)
    same = [space("a.x=1,2"), space("b.x=1,2")]
    assert name(1, same, (1, 2), 0) == "w1-a.x1-b.x2-s0"


LR = [space("optim.lr=log:1..16")]


def judged(losses: Mapping[int, Mapping[int, Sequence[float]]], spaces: Any = None) -> Any:
    points = {w: {(v,): own for v, own in of.items()} for w, of in losses.items()}
    return verdict(spaces or LR, points, gridded=True)


def test_a_best_value_transfers_if_it_moves_by_a_step_at_most() -> None:
    narrow = {1: [5.0], 2: [4.0], 4: [6.0], 8: [math.inf], 16: [math.inf]}
    wide = {1: [3.0], 2: [3.5], 4: [4.0], 8: [5.0], 16: [math.inf]}
    found = judged({24: narrow, 96: wide})
    # The widest's best is the lowest that was tried: whether it is one step off, nobody knows.
    assert (found["moves"], found["transfers"], found["wider_is_better"]) == (1, None, True)
    inner = judged({24: narrow, 96: {0.5: [9.0]} | wide})
    assert (inner["moves"], inner["transfers"]) == (1, True)
    assert (found["transferred"], found["losses_there"]) == (2, {"24": 4.0, "96": 3.5})
    assert found["factor"] == 0.5
    assert [row["values"] for row in found["best"]] == [{"optim.lr": 2}, {"optim.lr": 1}]
    assert [row["at_edge"] for row in found["best"]] == [[], ["optim.lr"]]
    far = judged({24: {4: [1.0], 1: [2.0]}, 48: narrow, 96: {1: [0.5], 4: [math.inf]}})
    assert (far["moves"], far["transfers"], far["wider_is_better"]) == (2, False, False)
    words = judged({24: {"a": [1.0]}, 96: {"a": [0.5]}}, [space("schedule.kind=a,b")])
    assert (words["moves"], words["transfers"], words["wider_is_better"]) == (None, None, True)


def test_steps_and_ends_are_of_what_was_tried() -> None:
    tried = {1: [9.0], 4: [3.0], 16: [4.0], 64: [9.0]}
    found = judged({24: tried, 96: tried | {4: [3.0], 16: [2.0]}}, [space("optim.lr=log:1..64")])
    assert (found["moves"], found["transfers"]) == (1, True)
    top = judged({24: tried | {64: [1.0]}, 96: tried | {64: [1.0]}})
    assert (top["moves"], top["transfers"]) == (0, None)
    assert [row["at_edge"] for row in top["best"]] == [["optim.lr"]] * 2


def test_the_verdict_is_told_in_sentences() -> None:
    def told(**verdict: Any) -> list[str]:
        best = [{"width": 24, "at_edge": ()}, {"width": 96, "at_edge": verdict.pop("edge", ())}]
        known = {"transfers": None, "moves": 1, "wider_is_better": True, "best": best} | verdict
        found = {"beside": [], "complete": True, "widths": [24, 96], "verdict": known}
        return tune_report.told(found)

    span = "from width 24 to width 96 the best point moves by 1"
    assert told(transfers=True) == [f"it transfers: {span} steps"]
    worse = "at the best point of width 24 a wider model is not better"
    assert told(transfers=False, wider_is_better=False) == [
        f"it does not transfer: {span} steps",
        worse,
    ]
    (line,) = told(edge=("optim.lr",))
    assert line.endswith("cannot be said: best at the end of what was tried (optim.lr)")
    unfinished = {"beside": ["w24-lr1-s0"], "complete": False, "widths": [24, 96], "verdict": {}}
    assert tune_report.told(unfinished) == [
        "not a part of this search, and not counted: w24-lr1-s0"
    ]


def test_no_verdict_where_all_diverged() -> None:
    found = judged({24: {1: [math.inf]}, 96: {1: [1.0]}})
    assert (found["moves"], found["transfers"], found["wider_is_better"]) == (None, None, None)
    assert found["best"][0]["values"] is None


def test_points_of_more_seeds_go_first_and_are_compared_over_common_ones() -> None:
    one = {1: [1.0], 2: [2.0, 2.0], 4: [1.5, 1.6], 8: [0.1, math.inf]}
    assert ranked({(v,): own for v, own in one.items()}) == [(4,), (2,), (1,)]
    found = judged({24: one, 96: {4: [1.49]}})
    assert found["losses_there"] == {"24": 1.5, "96": 1.49}
    assert found["best"][0] | {"spread": None} == {
        "width": 24,
        "values": {"optim.lr": 4},
        "loss": pytest.approx(1.55),
        "seeds": 2,
        "spread": None,
        "at_edge": [],
    }
    assert found["best"][0]["spread"] == pytest.approx(0.1)


def write_run(folder: Path, losses: Sequence[float | None], *, done: bool, log: str = "") -> None:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"step": i + 1, "loss": loss, "step_time": 0.5}) for i, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "logs" / "tune.log").write_text(log)
    if done:
        (folder / "done").write_text(f"{len(losses)}\n")


CRASH = "[rank 0] Traceback (most recent call last):\n[rank 0]   File x\n[rank 0] "


@pytest.mark.parametrize(
    ("losses", "done", "log", "state", "reason"),
    [
        ([3.0] * 8 + [1.0, 2.0], True, "", "done", None),
        ([3.0] * 8 + [1.0, 6.0], True, "", "diverged", "at the end, 3.5, is above 3"),
        ([3.0] * 9 + [None], True, "", "diverged", "step 10 is not finite"),
        ([3.0, None] + [2.0] * 8, True, "", "done", None),
        ([3.0, 2.0], False, "", "unfinished", None),
        ([3.0, None], False, "", "unfinished", None),
        ([3.0, None], False, f"{CRASH}NoWayBackError: none", "diverged", "none"),
        ([3.0, None], False, f"{CRASH}IndexError: nan", "diverged", "not finite, then rank 0: I"),
        ([3.0, 2.0], False, f"{CRASH}OSError: full", "unfinished", None),
    ],
)
def test_how_a_run_ended(
    losses: list[float | None], done: bool, log: str, state: str, reason: str, tmp_path: Path
) -> None:
    write_run(tmp_path, losses, done=done, log=log)
    found = outcome_of(tmp_path, 10)
    assert found.state == state, found
    assert (reason in str(found.reason)) if reason else found.reason is None
    assert (found.loss is None) == (state != "done")
    assert (found.steps, found.seconds, found.first_loss) == (len(losses), len(losses) / 2, 3.0)


def test_the_score_is_the_mean_of_the_last_fifth(tmp_path: Path) -> None:
    write_run(tmp_path, [9.0] * 8 + [1.0, 2.0], done=True)
    assert outcome_of(tmp_path, 10).loss == 1.5
    assert outcome_of(tmp_path / "none", 10) == Outcome("unfinished")


def searched(tmp_path: Path, data: Path, **more: Any) -> Search:
    model = more.pop("model", "dit+mup")
    path = tiny.write(tmp_path, model, data, steps=10, **more.pop("changes", {}))
    asked: dict[str, Any] = {"overrides": (), "widths": (16, 32), "out": tmp_path / "out"}
    asked["spaces"] = (space("optim.lr=0.5,1,2,4"),)
    return Search(path, **asked | more)


class Ended:
    """A trial that has ended as `run` says, which writes its directory."""

    def __init__(self, run: Callable[[Path, dict[str, str]], int], words: Sequence[str]) -> None:
        settings = dict(word.split("=", 1) for word in words[2:])
        self._code = run(Path(settings["run_dir"]), settings)

    def poll(self) -> int:
        return self._code

    def send_signal(self, sig: int, /) -> None:
        raise AssertionError(f"signal {sig} to a trial that has ended")


def run(sweep: Sweep, how: Callable[[Path, dict[str, str]], int]) -> list[str]:
    """Names of the trials that were started."""
    started: list[str] = []

    def start(words: Sequence[str], env: Mapping[str, str], log: Path) -> Ended:
        assert env["WORLD_SIZE"] == "1"
        log.touch()
        started.append(log.parent.parent.name)
        return Ended(how, words)

    assert sweep.run(2, lambda trial: None, start)
    return started


def bowl(folder: Path, settings: dict[str, str]) -> int:
    """Best at 1; 4 diverges."""
    lr = float(settings["optim.lr"])
    end = 99.0 if lr == 4 else 1 + abs(math.log2(lr)) + 0.1 * int(settings["seed"])
    write_run(folder, [50.0] * 8 + [end] * 2, done=True)
    return 0


def test_further_seeds_are_of_the_best_points_of_each_width(tmp_path: Path, digits: Path) -> None:
    search = searched(tmp_path, digits, seeds=3, best=2)
    sweep = Sweep(search)
    started = run(sweep, bowl)
    further = {word for word in started if not word.endswith("-s0")}
    assert len(started) == 2 * 4 + 2 * 2 * 2
    assert further == {f"w{w}-lr{lr}-s{s}" for w in (16, 32) for lr in ("1", "0.5") for s in (1, 2)}
    found = tune_report.save(sweep)
    assert found["counts"] == {"done": 14, "diverged": 2}
    assert found["complete"]
    assert found["losses"][3] == {"optim.lr": 4, "width 16": "diverged", "width 32": "diverged"}
    assert found["losses"][1]["width 16"] == "1.1000 ±0.1000 (3 seeds)"
    assert found["seconds"] == 16 * 5.0
    assert json.loads((search.out / "tune.json").read_text())["trials"] == found["trials"]
    tune_report.draw(tmp_path / "x.png", sweep)
    assert (tmp_path / "x.png").stat().st_size > 5000
    assert run(Sweep(search), bowl) == []


def test_a_trial_that_fails_is_repeated_and_the_rest_goes_on(tmp_path: Path, digits: Path) -> None:
    search = searched(tmp_path, digits, seeds=2, best=1)

    def faulty(folder: Path, settings: dict[str, str]) -> int:
        if folder.name == "w16-lr1-s0":
            (folder / "logs" / "tune.log").write_text("pretrain: no such data\n")
            return 2
        return -9 if folder.name == "w32-lr2-s0" else bowl(folder, settings)

    sweep = Sweep(search)
    assert len(run(sweep, faulty)) == 8  # no further seeds where the best point is not known
    found = tune_report.save(sweep)
    assert found["counts"] == {"done": 4, "failed": 2, "diverged": 2}
    assert not found["complete"]
    reasons = {row["name"]: row["reason"] for row in found["trials"] if row["state"] == "failed"}
    assert reasons["w16-lr1-s0"].startswith("no such data (")
    assert reasons["w32-lr2-s0"].startswith("was ended by SIGKILL (")
    assert found["verdict"]["best"][1]["values"] is None  # w32-lr2 may be the best
    again = ["w16-lr1-s0", "w32-lr2-s0", "w16-lr1-s1", "w32-lr1-s1"]
    assert sorted(run(Sweep(search), bowl)) == sorted(again)


def test_a_budget_is_of_all_trials_and_spends_whole_points(tmp_path: Path, digits: Path) -> None:
    sweep = Sweep(searched(tmp_path, digits, budget=7, seeds=9))
    assert sweep.beyond_budget == 2
    started = run(sweep, bowl)
    assert len(started) == 7
    assert len([word for word in started if word.endswith("-s0")]) == 6
    more = searched(tmp_path, digits, budget=11, seeds=9, out=tmp_path / "more")
    further = [word for word in run(Sweep(more), bowl) if not word.endswith("-s0")]
    assert further == ["w16-lr1-s1", "w32-lr1-s1", "w16-lr0.5-s1"]
    with pytest.raises(TuneError, match="give at least 2"):
        Sweep(searched(tmp_path, digits, budget=1))


@pytest.mark.parametrize(
    ("model", "width", "words"),
    [
        ("dit-moe+mup", 64, {"model.width=64", "model.num_heads=4"}),
        ("udit-moe+mup", 32, {"model.width=32", "model.num_heads=4"}),
    ],
)
def test_a_width_is_said_in_the_family_s_words(
    model: str, width: int, words: set[str], tmp_path: Path
) -> None:
    sweep = Sweep(searched(tmp_path, tmp_path, model=model, widths=(width,)))
    (trial, *_) = sweep.trials()
    assert {word for word in trial.words if word.startswith("model.")} == words
    assert trial.cfg.model.width == width
    assert trial.cfg.model.mup == sweep.base.model.mup


def test_heads_of_a_size_follow_and_those_of_a_head_dim_by_themselves(tmp_path: Path) -> None:
    path, spaces = ROOT / "configs" / "udit_l_in256.yaml", (space("optim.lr=1,2"),)
    (trial, *_) = Sweep(Search(path, (), spaces, (96,), tmp_path)).trials()
    assert (trial.cfg.model.num_heads, trial.cfg.sample.every) == (4, 0)
    path = ROOT / "configs" / "demo.yaml"
    (trial, *_) = Sweep(Search(path, (), spaces, (64,), tmp_path)).trials()
    assert (trial.cfg.model.num_heads, trial.cfg.model.head_dim) == (None, 16)


def test_a_search_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    def refused(*words: str, **more: Any) -> Sweep:
        return Sweep(searched(tmp_path, tmp_path, spaces=tuple(map(space, words)), **more))

    with pytest.raises(ConfigError, match='did you mean "lr"'):
        refused("optim.lrr=1,2")
    with pytest.raises(TuneError, match="seed is no parameter of a search"):
        refused("seed=1,2")
    with pytest.raises(TuneError, match="steps is no parameter of a search: losses of other"):
        refused("steps=10,20")
    with pytest.raises(TuneError, match="is there twice"):
        refused("optim.lr=1,2", "optim.lr=1,4")
    with pytest.raises(TuneError, match="optim.lr is set too"):
        refused("optim.lr=1,2", overrides=("optim.lr=3",))
    with pytest.raises(TuneError, match="standard has no use for it"):
        refused("model.mup.output_mult=1,2", overrides=("parametrisation=standard",))
    with pytest.raises(TuneError, match=r"two trials are called w16-lr1-s0"):
        refused("optim.lr=1,1.00000001")
    with pytest.raises(MupError, match="24 is no width"):
        refused("optim.lr=1,2", widths=(24,))
    with pytest.raises(TuneError, match="steps=4: .* at least 5"):
        refused("optim.lr=1,2", overrides=("steps=4",))
    with pytest.raises(TuneError, match="run_dir=x: tune sets that by itself"):
        refused("optim.lr=1,2", overrides=("run_dir=x",))
    with pytest.raises(TuneError, match="log.every=9: tune sets that by itself"):
        refused("optim.lr=1,2", overrides=("log.every=9",))


def test_missing_data_is_refused_before_any_trial(tmp_path: Path) -> None:
    def start(words: Sequence[str], env: Mapping[str, str], log: Path) -> Ended:
        raise AssertionError("a trial was started")

    sweep = Sweep(searched(tmp_path, tmp_path / "none"))
    with pytest.raises(DataError, match="none"):
        sweep.run(1, lambda trial: None, start)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is no directory"):
        Sweep(searched(tmp_path, tmp_path, out=tmp_path / "file"))


def test_a_trial_begun_with_other_settings_is_refused(tmp_path: Path) -> None:
    search = searched(tmp_path, tmp_path)
    (trial, *_) = Sweep(search).trials()
    trial.folder.mkdir(parents=True)
    begun = trial.cfg.model_copy(update={"threads": 7, "run_dir": "elsewhere"})
    (trial.folder / "config.yaml").write_text(config.to_yaml(begun))
    Sweep(search)
    begun = begun.model_copy(update={"steps": 11})
    (trial.folder / "config.yaml").write_text(config.to_yaml(begun))
    with pytest.raises(TuneError, match="was begun with steps=11, not 10; restore that, or give"):
        Sweep(search)


def target(tmp_path: Path, model: str = "dit", **changes: Any) -> Path:
    return tiny.write(tmp_path / "target", model, tmp_path, model__width=64, **changes)


def test_the_tuned_target_loads_and_its_plan_states_the_share(tmp_path: Path, digits: Path) -> None:
    search = searched(tmp_path, digits)
    sweep, aim = Sweep(search), target(tmp_path, model__num_heads=4)

    def moved(folder: Path, settings: dict[str, str]) -> int:
        """The narrow model is best at half the rate."""
        twice = str(2 * float(settings["optim.lr"]))
        narrow = settings["model.width"] == "16"
        return bowl(folder, settings | {"optim.lr": twice} if narrow else settings)

    run(sweep, moved)
    found = tune_report.save(sweep)
    assert [row["values"]["optim.lr"] for row in found["verdict"]["best"]] == [0.5, 1]
    tuned = tune_target.write(sweep, aim, found, ["tune", "x y"])
    assert tuned is not None
    assert tuned.name == "dit_tuned.yaml"
    assert tuned.read_text().startswith("# dit.yaml under muP, with what was best for dit+mup.yaml")
    assert "pretrain tune 'x y'\n" in tuned.read_text()
    cfg, plain = config.load(tuned, []), config.load(aim, [])
    assert (cfg.optim.lr, cfg.parametrisation, cfg.run_dir) == (1, "mup", "runs/dit_tuned")
    assert cfg.model == plain.model.model_copy(update={"mup": sweep.base.model.mup})
    assert cfg.tuning is not None
    assert (cfg.tuning.trials, cfg.tuning.diverged, cfg.tuning.flops) == (8, 2, found["flops"])
    assert (cfg.tuning.loss, cfg.tuning.seeds, cfg.tuning.transfers) == (1, 1, None)
    assert (cfg.tuning.parameters, cfg.tuning.values) == (
        {"optim.lr": "0.5,1,2,4"},
        {"optim.lr": 1},
    )
    share = planned.of(cfg, 1, "cpu")
    assert share["tuning_share"] == found["flops"] / share["flops_run"] > 0
    assert "tuning_share" not in planned.of(plain, 1, "cpu")
    bare = cfg.model_copy(update={"tuning": None})
    assert preflight.identity(cfg, None) == preflight.identity(bare, None)
    tune_target.write(sweep, aim, found, [])  # its own file is written again
    tuned.write_text(aim.read_text())
    with pytest.raises(TuneError, match="is there, and not from"):
        tune_target.check(sweep, aim)


def test_any_key_is_carried_over_as_a_trial_has_it(tmp_path: Path, digits: Path) -> None:
    """Also one of the model, a null, and drawn values; what speaks against it is said."""
    spaces = (space("model.mup.output_mult=0.5,2"), space("clip=null,1.0"), space("optim.lr=1,4"))
    search = searched(tmp_path, digits, spaces=spaces, random=6)
    sweep, aim = Sweep(search), target(tmp_path, model__num_heads=4, schedule__kind="cosine")

    def best(folder: Path, settings: dict[str, str]) -> int:
        loss = 1 + (settings["clip"] != "null") + (settings["model.mup.output_mult"] != "2")
        return bowl(folder, settings | {"seed": str(10 * loss)})

    tune_target.check(sweep, aim)
    run(sweep, best)
    found = tune_report.save(sweep)
    assert (found["verdict"]["moves"], found["verdict"]["transfers"]) == (None, None)
    tuned = tune_target.write(sweep, aim, found, [])
    assert tuned is not None
    cfg = config.load(tuned, [])
    assert cfg.model.mup is not None
    assert (cfg.model.mup.output_mult, cfg.clip, cfg.optim.lr) == (2, None, 1)
    assert "# CAUTION: schedule.kind is constant in the proxy and cosine here." in tuned.read_text()
    assert "# CAUTION: these proxies do not tell whether it transfers." in tuned.read_text()


def test_nothing_is_written_where_every_wide_trial_diverged(tmp_path: Path, digits: Path) -> None:
    sweep, aim = Sweep(searched(tmp_path, digits)), target(tmp_path, model__num_heads=4)
    run(sweep, lambda folder, settings: bowl(folder, settings | {"optim.lr": "4"}))
    assert tune_target.write(sweep, aim, tune_report.save(sweep), []) is None
    assert not (aim.parent / "dit_tuned.yaml").exists()


def test_a_target_that_is_no_family_is_refused_before_any_trial(tmp_path: Path) -> None:
    sweep = Sweep(searched(tmp_path, tmp_path))
    with pytest.raises(MupError, match=r"model.patch is 2 in the proxy and 1 in the target"):
        tune_target.check(sweep, target(tmp_path, model__num_heads=4, model__patch=1))
    plain = Sweep(searched(tmp_path, tmp_path, overrides=("parametrisation=standard",)))
    with pytest.raises(TuneError, match="parametrisation=standard"):
        tune_target.check(plain, target(tmp_path, model__num_heads=4))


@pytest.mark.parametrize("there", [True, False])
def test_an_array_is_written_and_submitted(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool, text in (("sbatch", 'echo "$@" >{}\necho 77'), ("squeue", "cat {}.queue")):
        (tools / tool).write_text(f"#!/bin/sh\n{text.format(tmp_path / 'asked')}\n")
        (tools / tool).chmod(0o755 if there else 0o644)
    monkeypatch.setenv("PATH", f"{tools}:/bin" if there else str(tools))
    sweep = Sweep(searched(tmp_path, tmp_path, overrides=("accum=2",)))
    out, path = sweep.search.out, sweep.search.path
    words = {trial.name: trial.words for trial in sweep.trials()}
    said = trials.hand_over(path, ("accum=2",), words, out)
    line = f"--array=1-8 --output={out}/%x-%A_%a.out slurm/mup_sweep.sh config={path} "
    line += f"points={out}/points.txt run_dir={out}"
    assert f"sbatch {line} accum=2" in said
    assert {n: tuple(w) for n, w in collecting.points(out / "points.txt").items()} == words
    assert trials.handed_over(out)
    assert said.startswith("job 77, 8 trials" if there else "there is no sbatch on this machine")
    if there:
        assert (tmp_path / "asked").read_text() == f"--parsable {line} accum=2\n"
        (tmp_path / "asked.queue").write_text("77_1 main\n")
        with pytest.raises(TuneError, match="job 77 of .* has not ended"):
            trials.hand_over(path, (), words, out)


def test_the_command_collects_what_slurm_has_done(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    search = searched(tmp_path, digits)
    sweep = Sweep(search)
    search.out.mkdir()
    (search.out / "points.txt").write_text("")
    some, other = sweep.trials()[:2], sweep.trials()[2:]

    def collect() -> tuple[int | str | None, dict[str, Any]]:
        words = f"pretrain tune {search.path} --param optim.lr=0.5,1,2,4 --widths 0.5x,1x --json"
        monkeypatch.setattr("sys.argv", [*words.split(), "--out", str(search.out)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, json.loads(capsys.readouterr().out)

    for trial in some:
        bowl(trial.folder, dict(word.split("=", 1) for word in trial.words))
    code, found = collect()
    assert (code, found["counts"]) == (1, {"done": 2, "unfinished": 6})
    for trial in other:
        bowl(trial.folder, dict(word.split("=", 1) for word in trial.words))
    code, found = collect()
    assert (code, found["counts"]) == (0, {"done": 6, "diverged": 2})
    assert found["verdict"]["moves"] == 0
    assert os.listdir(search.out).count("tune.png") == 1
