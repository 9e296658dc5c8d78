"""What FP8 costs a U-DiT-MoE on Fashion-MNIST: bf16 and each recipe, 500 steps, one core.

    pretrain data encode fashion-mnist --out data/fashion --codec haar2  # through PRETRAIN_DATA
    python -m tests.speed.fp8_gap data/fashion --out runs/fp8_gap

Runs are paired: same seed, data and noise. The gap is that of the training loss, mean of the last
50 steps. In the last run the scales of one product break on the way; what its guard did is said.
"""

import argparse
import json
import shutil
from pathlib import Path

from omegaconf import OmegaConf

from tests import ranks

LAST = 50  # steps
RUNS = {
    "bf16": ("precision=bf16",),
    "delayed": ("precision=fp8", "fp8.recipe=delayed"),
    "current": ("precision=fp8", "fp8.recipe=current"),
    "block": ("precision=fp8", "fp8.recipe=block"),
    "attention": ("precision=fp8", "fp8.recipe=delayed", "fp8.attention=true"),
}
BROKEN = "latent.blocks.0.first.attn.core.out"
MOE = {"experts": 8, "top_k": 2, "hidden_ratio": 0.5, "stages": ["enc2", "latent"]}


def config(data: Path, out: Path, steps: int, batch: int) -> Path:
    """fashion_udit.yaml with experts, for so many steps of so many images."""
    tree = OmegaConf.load("configs/fashion_udit.yaml")
    changes = {
        "model.moe": MOE,
        "data.path": str(data),
        "data.global_batch": batch,
        "steps": steps,
        "threads": 1,
        "schedule.cooldown": steps // 3,
        "sample.every": 0,
        "log": {"every": 1, "wandb": "disabled"},
        "checkpoint.every": steps,
        "fp8.guard_every": max(1, steps // 5),
    }
    for key, value in changes.items():
        OmegaConf.update(tree, key, value, force_add=True)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.yaml"
    OmegaConf.save(tree, path)
    return path


def broken(at: int, *words: str) -> None:
    """Trains; from step `at` on the scales of one product allow for 2^20 times what is there."""
    from parallel.fp8.scaling import Scaling

    honest, seen = Scaling.loaded, [0]

    def loaded(self: Scaling) -> None:
        honest(self)
        seen[0] += 1
        if seen[0] >= at:
            self.products[BROKEN].past.mul_(2.0**20)

    Scaling.loaded = loaded  # type: ignore[method-assign]
    ranks.pretrain(*words)


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_gap"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=[*list(RUNS)[:4], "broken", "attention"])
    args = parser.parse_args()
    ranks.LIMIT = 3600.0
    path = config(args.data, args.out, args.steps, args.batch)
    for name in args.only:
        run = args.out / name
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        words = ("train", str(path), f"run_dir={run}", *RUNS.get(name, RUNS["delayed"]))
        if name == "broken":
            process = ranks.start(broken, 1, args.steps // 2, *words, log=run / "ranks.log")
        else:
            process = ranks.start(ranks.pretrain, 1, *words, log=run / "ranks.log")
        codes = ranks.wait(process, ranks.LIMIT)
        assert codes == [0], (run / "ranks.log").read_text()[-2000:]
        found = losses(run)
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        said = f"{name:10} loss {mean(found[-LAST:]):.5f}"
        if (args.out / "bf16" / "metrics.jsonl").exists() and name != "bf16":
            base = losses(args.out / "bf16")
            gap = mean(found[-LAST:]) / mean(base[-LAST:]) - 1
            worst = max(abs(a / b - 1) for a, b in zip(found, base, strict=True))
            said += f"  gap {gap:+.3%}  largest of a step {worst:.2%}"
            said += f"  guard's gap {line['fp8.gap']:.3%}  fell back {line['fp8.fallbacks']}"
        print(said, flush=True)
        for text in (run / "log.txt").read_text().splitlines():
            if "back to bf16" in text:
                print(f"           {text[21:]}", flush=True)


if __name__ == "__main__":
    main()
