"""What the tests do with jobs: submit a shipped script with a tiny configuration, look, hurt it."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from pretrain import inspection, timeline
from tests import tiny
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}  # others come and go


class Jobs:
    def __init__(self, cluster: Cluster, folder: Path, data: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.config = tiny.write(
            folder,
            "udit-moe",
            data,
            steps=STEPS,
            mesh__ep=2,
            threads=1,
            checkpoint__every=4,
            sample__every=STEPS,
            sample__sampler="heun",
            sample__steps=2,
        )
        self.run_dir = folder / "run"
        self._mine: list[str] = []
        self._waiting: dict[tuple[str, str], float] = {}

    def submit(
        self, script: str, *words: str, options: tuple[str, ...] = (), **settings: str
    ) -> str:
        """The number of the job. words: the script's arguments; settings: environment."""
        logs = f"--output={self.folder}/%x-%j.out"
        env = {
            "GPUS_PER_NODE": "2",
            "WANDB_MODE": "disabled",
            "PRETRAIN_SITE": str(self.folder / "site"),
        }
        if not self.cluster.isolated:
            env["HEAD_ADDRESS"] = "127.0.0.1"
        number = self.cluster.run(
            *("sbatch", "--parsable", logs, *options, f"slurm/{script}.sh", *words),
            env=env | settings,
            cwd=ROOT,
        ).strip()
        self._mine.append(number)
        return number

    def train(self, *words: str, options: tuple[str, ...] = (), **settings: str) -> str:
        """The flagship's script with the tiny U-DiT-MoE on 2 nodes × 2 processes."""
        own = (f"config={self.config}", f"run_dir={self.run_dir}")
        return self.submit("udit_xl_moe", *own, *words, options=options, **settings)

    def pretrain(self, *words: str) -> str:
        """What `pretrain …` prints, run where jobs are submitted."""
        env = {"PRETRAIN_SITE": str(self.folder / "site"), "WANDB_MODE": "disabled"}
        if not self.cluster.isolated:
            env["HEAD_ADDRESS"] = "127.0.0.1"
        return self.cluster.run(sys.executable, "-m", "pretrain", *words, env=env, cwd=ROOT)

    def log(self, job: str) -> str:
        return "".join(path.read_text() for path in self.folder.glob(f"*-{job}.out"))

    def wait(self, job: str, limit: float = 300) -> str:
        """The final state of a job."""
        last = ""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            self.hurry(job)
            state = self.cluster.states(job)
            final = len(state) == 1 and next(iter(state))
            if final == last and final in FINAL:
                return str(final)
            last = str(final)
            time.sleep(0.2)
        raise AssertionError(
            f"job {job}: still {last} after {limit} s\n{self.log(job)}{self.ranks()}"
        )

    def hurry(self, job: str) -> None:
        """A requeued job does not wait for its munge credential to expire.

        Why once a life: each time its start is set anew, the scheduler looks later. Why not at
        once: a credential of the same second counts as replayed, and the job fails.
        """
        facts = self.cluster.job(job)
        life = (job, facts.get("Restarts", ""))
        if facts.get("Reason") == "BeginTime":
            since = self._waiting.setdefault(life, time.monotonic())
            if time.monotonic() - since > 2:
                self._waiting[life] = math.inf
                self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def until_step(self, step: int, limit: float = 200) -> None:
        """Until the trainer has logged this step."""
        self.cluster.until(f"step {step}", lambda: self.step() >= step, limit)

    def step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        whole = [line for line in lines if line.endswith("}")]
        return json.loads(whole[-1])["step"] if whole else -1

    def attempts(self, event: str = "end") -> list[dict[str, Any]]:
        """Lines of attempts.jsonl."""
        path = self.run_dir / "attempts.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def start_seconds(self, begin: dict[str, Any]) -> float:
        """From the start of a life (a line of attempts.jsonl) to its first step that is done."""
        lines = timeline.objects(self.run_dir / timeline.TIMELINE)
        steps = (line["time"] for line in lines if line["event"] == "steps")
        return next(time for time in steps if time > begin["time"]) - begin["time"]

    def nodes(self) -> set[str]:
        """Where the newest life of the run was trained."""
        spelled = self.attempts("begin")[-1]["nodes"]
        return set(self.cluster.run("scontrol", "show", "hostnames", spelled).split())

    def until_attempt(self, number: int, job: str, limit: float = 120) -> None:
        """Until the job's incarnation of this number has begun."""

        def begun() -> bool:
            self.hurry(job)
            return len(self.attempts("begin")) > number

        self.cluster.until(f"attempt {number} of {self.log(job)}", begun, limit)

    def send(self, number: int, ranks: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        """A signal to the training processes of this run."""
        found = self._ranks()
        assert set(ranks) <= set(found), f"of ranks {ranks} only {sorted(found)} are running"
        for rank in ranks:
            os.kill(found[rank], number)

    def _ranks(self) -> dict[int, int]:
        """Process numbers by rank."""
        found: dict[int, int] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_text().split("\0")
                environment = (entry / "environ").read_text(errors="replace").split("\0")
            except OSError:
                continue
            rank = [v.split("=")[1] for v in environment if v.startswith("SLURM_PROCID=")]
            if f"run_dir={self.run_dir}" in words and "train" in words and rank:
                found[int(rank[0])] = int(entry.name)
        return found

    def digest(self) -> dict[str, Any]:
        """Every tensor and the clock of the newest checkpoint."""
        found = inspection.contents(self.run_dir, digest=True)
        return {name: value for name, value in found.items() if name not in ("checkpoint", "bytes")}

    def ranks(self) -> str:
        """The last lines of every rank's log."""
        logs = sorted((self.run_dir / "logs").glob("*.log"))
        return "".join(f"\n== {p.name}\n{p.read_text()[-1500:]}" for p in logs)

    def cancel(self) -> None:
        if self._mine:
            self.cluster.run("scancel", *self._mine, check=False)


def assert_same_end(jobs: Jobs, number: str, undisturbed: Jobs) -> None:
    assert jobs.wait(number) == "COMPLETED", jobs.log(number) + jobs.ranks()
    assert jobs.attempts()[-1]["outcome"] == "done"
    assert jobs.digest() == undisturbed.digest()
