"""`make demo`: real digits in, a trained, stopped, resumed, sampled and scored U-DiT-MoE out.

Nothing here that a person could not type: it runs the commands of README one after the other and
prints what came out.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pretrain import config, pictures
from pretrain.evaluate import Scores
from pretrain.trained import Trained

CONFIG = Path("configs/demo.yaml")
RANKS = 2
SAMPLES = 500
SHOWN = 10  # pictures of each class in the grid


def run(*words: str) -> "subprocess.Popen[bytes]":
    print(f"\n$ pretrain {' '.join(words)}", flush=True)
    return subprocess.Popen([sys.executable, "-m", "pretrain", *words])


def ended_well(process: "subprocess.Popen[bytes]") -> None:
    if process.wait():
        sys.exit(f"the command above ended with exit code {process.returncode}")


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl so far."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def train_with_a_stop(cfg: config.Config) -> int | None:
    """Trains to the end, asked to stop once on the way; at which step, None if it was past."""
    run_dir = Path(cfg.run_dir)
    words = ("train", str(CONFIG), "--nproc", str(RANKS))
    half = cfg.steps // 2
    stopped = None
    first = run(*words)
    while first.poll() is None:
        seen = records(run_dir)
        if stopped is None and seen and half <= seen[-1]["step"] < cfg.steps:
            print(f"\n$ touch {run_dir / 'stop'}", flush=True)
            (run_dir / "stop").touch()
            stopped = seen[-1]["step"]
        time.sleep(0.2)
    ended_well(first)
    if not (run_dir / "done").exists():
        stopped = int((run_dir / "latest").read_text())
        print(f"\nstopped and saved at step {stopped}; the same command goes on:", flush=True)
        ended_well(run(*words))
    return stopped


def show(cfg: config.Config, scores: Scores, stopped: int | None, seconds: float) -> None:
    run_dir = Path(cfg.run_dir)
    history = records(run_dir)
    rate = float(np.median([line["images_per_s"] for line in history]))
    table = Table(title="demo: U-DiT-MoE on real digits, sharded over two processes")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_column("wanted", justify="right")
    rows = (
        ("loss, first → last", f"{history[0]['loss']:.3f} → {history[-1]['loss']:.3f}", ""),
        ("images a second (median)", f"{rate:.0f}", ""),
        ("stopped and resumed at step", str(stopped), ""),
        ("pictures scored", str(scores.n), ""),
        ("classifier on held-out real digits", f"{scores.classifier_accuracy:.3f}", "≥ 0.95"),
        ("class agreement of guided samples", f"{scores.class_agreement:.3f}", "≥ 0.90"),
        ("Fréchet distance on the classifier's features", f"{scores.frechet:.1f}", ""),
        ("  of the ten class means", f"{scores.frechet_of_class_means:.1f}", ""),
        ("  ratio", f"{scores.frechet_ratio:.3f}", "≤ 0.333"),
        ("within-class pixel deviation, samples", f"{scores.within_class_std:.1f}", ""),
        ("  of real digits", f"{scores.within_class_std_real:.1f}", ""),
        ("  ratio", f"{scores.std_ratio:.3f}", "≥ 0.60"),
        ("seconds in all", f"{seconds:.0f}", "≤ 480"),
        ("pictures", str(run_dir / "samples.png"), ""),
        ("metrics", str(run_dir / "metrics.jsonl"), ""),
        ("checkpoints", str(run_dir / "checkpoints"), ""),
    )
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)


def main() -> None:
    begin = time.monotonic()
    cfg = config.load(CONFIG, [])
    run_dir, data = Path(cfg.run_dir), Path(cfg.data.path)
    if not (data / "manifest.json").exists():
        ended_well(
            run("data", "encode", "digits", "--out", str(data), "--codec", str(cfg.data.codec))
        )
    if (run_dir / "done").exists():
        print(f"{run_dir} is complete; remove it to train again")
    stopped = train_with_a_stop(cfg)
    print(f"\nscoring {SAMPLES} pictures", flush=True)
    trained = Trained.load(run_dir)
    scores, images = trained.score(trained.sampling(), count=SAMPLES, seed=cfg.seed)
    classes = trained.latents.num_classes
    rows = np.arange(classes * SHOWN).reshape(SHOWN, classes).T.ravel()  # a row a class
    pictures.save(run_dir / "samples.png", images[rows], columns=SHOWN)
    show(cfg, scores, stopped, time.monotonic() - begin)


if __name__ == "__main__":
    main()
