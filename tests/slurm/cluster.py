"""A throw-away Slurm on this machine: three nodes of eight pretended GPUs, up in about a second.

    python -m tests.slurm.cluster start DIR        prints what to source; python … stop DIR

Everything lies below DIR, nothing of /etc is touched, processes are known by their numbers alone.
Where the machine allows namespaces, each node has a host name and processes of its own: killing it
is a power cut. Needs Debian's slurmctld, slurmd, slurm-client and munge.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"
NODES, GPUS = 3, 8
NAMESPACES = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
NODE = (
    "NodeName=node{i} NodeHostname={host} NodeAddr={address} Port={port} CPUs=64 Boards=1 "
    "SocketsPerBoard=2 CoresPerSocket=32 ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:h100:8 "
    "Feature=h100 State=UNKNOWN"
)


def missing() -> list[str]:
    """The commands this needs that the machine does not have."""
    commands = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
    return [name for name in commands if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin"


class Cluster:
    """Daemons below one directory, started by `start`, ended by `stop`."""

    def __init__(self, folder: Path) -> None:
        self.dir = folder.resolve()
        assert len(str(self.dir)) < 80, f"{self.dir}: too long for a unix socket"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.env = inherited | {"SLURM_CONF": str(self.dir / "etc/slurm.conf"), "PATH": _path()}

    # -- daemons ------------------------------------------------------------------------------

    def start(self) -> None:
        """Until all nodes are idle; raises RuntimeError with the logs if they do not come up."""
        for name in ("etc", "state", "spool", "log", "run", "dev", "munge"):
            (self.dir / name).mkdir(parents=True, exist_ok=True)
        for name in (".", "run"):
            (self.dir / name).chmod(0o755)  # why: munged refuses a socket that others cannot reach
        (self.dir / "munge").chmod(0o700)
        self._write()
        self._daemon("munged", *self._munged())
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for number in range(1, NODES + 1):
            self.heal(number)
        end = time.monotonic() + 30
        while self.idle() < NODES:
            if time.monotonic() > end:
                logs = [f"{p.name}:\n{p.read_text()[-1500:]}" for p in self.dir.glob("log/*")]
                self.stop()
                raise RuntimeError("Slurm does not come up\n" + "\n".join(logs))
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends the jobs, then every process by its number."""
        self.run("scancel", "--user", self._user(), check=False)
        end = time.monotonic() + 3
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < end:
            time.sleep(0.1)
        for number in range(1, NODES + 1):
            self.fail(number)
        for name in ("slurmctld", "munged"):
            self._end(name)

    def fail(self, number: int) -> None:
        """The power of a node is cut: its daemon and all that runs on it vanish."""
        if not self.isolated:
            for entry in Path("/proc").glob("[0-9]*"):
                if f"SLURMD_NODENAME=node{number}\0" in _read(entry / "environ") and str(
                    self.dir
                ) in _read(entry / "environ"):
                    _kill(int(entry.name))
        self._end(f"node{number}")

    def heal(self, number: int) -> None:
        """Starts a node's daemon."""
        (self.dir / "spool" / f"node{number}").mkdir(exist_ok=True)
        words = ["slurmd", "-D", "-N", f"node{number}"]
        if self.isolated:
            script = 'hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts; shift 2; exec "$@"'
            words = [
                *self._namespaces(),
                "bash",
                "-c",
                script,
                "_",
                f"node{number}",
                str(self.dir),
            ] + words
        self._daemon(f"node{number}", *words)

    def inside(self, number: int, *words: str) -> None:
        """Runs a command in a node's own view of the file system. Only where nodes are isolated."""
        pid = (self.dir / "run" / f"node{number}.number").read_text()
        child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        subprocess.run(["nsenter", "-t", child, "-m", *words], check=True, env=self.env)

    def ask_before_preemption(self, asked: bool) -> None:
        """Whether preemption sends the signal of --signal; else the ranks get TERM, nobody more."""
        conf, setting = self.dir / "etc" / "slurm.conf", "SlurmctldParameters="
        old = conf.read_text()
        lines = [line for line in old.splitlines() if not line.startswith(setting)]
        lines += [f"{setting}preempt_send_user_signal"] if asked else []
        new = "\n".join(lines) + "\n"
        if sorted(new.splitlines()) != sorted(old.splitlines()):
            conf.write_text(new)
            self.run("scontrol", "reconfigure")

    def _daemon(self, name: str, *words: str) -> None:
        with (self.dir / "log" / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.env,
                start_new_session=True,
            )
        (self.dir / "run" / f"{name}.number").write_text(str(process.pid))

    def _end(self, name: str) -> None:
        number = self.dir / "run" / f"{name}.number"
        if number.exists():
            _kill(int(number.read_text()))
            number.unlink()

    def _munged(self) -> list[str]:
        d = self.dir
        return [
            "munged", "--force", "--foreground", "--origin=127.0.0.1", "--num-threads=2",
            f"--key-file={d}/munge/key", f"--socket={d}/run/munge.sock",
            f"--pid-file={d}/run/munged.pid",
            f"--log-file={d}/log/munged.log", f"--seed-file={d}/munge/seed",
        ]  # fmt: skip

    # -- its files ----------------------------------------------------------------------------

    def _write(self) -> None:
        key = self.dir / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for gpu in range(GPUS):
            (self.dir / "dev" / f"nvidia{gpu}").symlink_to("/dev/null")
        etc = self.dir / "etc"
        (etc / "gres.conf").write_text(
            f"Name=gpu Type=h100 File={self.dir}/dev/nvidia[0-{GPUS - 1}]\n"
        )
        # A node whose file is there fails its prolog.
        (etc / "prolog").write_text(f'#!/bin/sh\n[ ! -e "{etc}/sick-$SLURMD_NODENAME" ]\n')
        (etc / "prolog").chmod(0o755)
        host = socket.gethostname().split(".")[0]
        hosts = [
            f"127.0.0.1 localhost {host}",
            *(f"{_address(i)} node{i}" for i in range(1, NODES + 1)),
        ]
        (etc / "hosts").write_text("\n".join(hosts) + "\n")
        ports = _free_ports(NODES + 1)
        if (
            subprocess.run(
                [
                    *self._namespaces(),
                    "bash",
                    "-c",
                    "hostname x && mount --bind /etc/hosts /etc/hosts",
                ],
                capture_output=True,
                check=False,
            ).returncode
            == 0
        ):
            (self.dir / "isolated").touch()
        lines = [
            NODE.format(
                i=i,
                host=f"node{i}" if self.isolated else host,
                address=_address(i) if self.isolated else "127.0.0.1",
                port=ports[i],
            )
            for i in range(1, NODES + 1)
        ]
        text = (
            (Path(__file__).parent / "slurm.conf")
            .read_text()
            .format(
                host=host, port=ports[0], user=self._user(), dir=self.dir, nodes="\n".join(lines)
            )
        )
        (etc / "slurm.conf").write_text(text)
        (self.dir / "env.sh").write_text(
            "unset $(compgen -v | grep -E '^(SLURM|SBATCH|SRUN|SALLOC)_')\n"
            f"export SLURM_CONF={etc}/slurm.conf\n"
        )

    @property
    def isolated(self) -> bool:
        return (self.dir / "isolated").exists()

    def _user(self) -> str:
        return subprocess.run(
            ["id", "-un"], capture_output=True, text=True, check=True
        ).stdout.strip()

    def _namespaces(self) -> list[str]:
        own = [] if os.getuid() == 0 else ["--map-current-user", "--keep-caps"]
        return [NAMESPACES[0], *own, *NAMESPACES[1:]]

    # -- jobs ---------------------------------------------------------------------------------

    def run(
        self,
        *words: str,
        check: bool = True,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> str:
        """A client command; its output. Raises CalledProcessError with what it said."""
        done = subprocess.run(
            words, capture_output=True, text=True, env=self.env | (env or {}), cwd=cwd, check=False
        )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def idle(self) -> int:
        return self.run(
            "sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N %t", check=False
        ).count(" idle\n")

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job, all elements of an array: the first one."""
        words = (
            self.run("scontrol", "-o", "show", "job", number, check=False).split("\n")[0].split()
        )
        return dict(word.split("=", 1) for word in words if "=" in word)

    def states(self, number: str) -> set[str]:
        lines = self.run("scontrol", "-o", "show", "job", number, check=False).splitlines()
        return {word[9:] for line in lines for word in line.split() if word.startswith("JobState=")}

    def until(self, what: str, true: Callable[[], bool], limit: float = 60) -> float:
        """Seconds until it was true."""
        begin = time.monotonic()
        while not true():
            if time.monotonic() - begin > limit:
                raise AssertionError(f"{what}: not within {limit} s")
            time.sleep(0.05)
        return time.monotonic() - begin


def _address(number: int) -> str:
    return f"127.0.0.{10 + number}"


def _free_ports(count: int) -> list[int]:
    """Below the range from which the system gives ports to others."""
    held: list[socket.socket] = []
    while len(held) < count:
        candidate = socket.socket()
        try:
            candidate.bind(("", random.randrange(20_000, 32_000)))
        except OSError:
            candidate.close()
            continue
        held.append(candidate)
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _kill(number: int) -> None:
    """And waits until it is gone; a zombie counts as gone."""
    try:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    while (state := _read(Path(f"/proc/{number}/stat")).rpartition(")")[2].split()) and state[
        0
    ] != "Z":
        time.sleep(0.02)


def main() -> None:
    verb, folder = sys.argv[1], Path(sys.argv[2])
    cluster = Cluster(folder)
    if verb == "start":
        absent = missing()
        if absent:
            sys.exit(f"{', '.join(absent)} not found; {INSTALL}")
        folder.mkdir(parents=True, exist_ok=True)
        cluster.start()
        print(f"source {cluster.dir}/env.sh")
    elif verb in ("stop", "fail", "heal"):
        getattr(cluster, verb)(*map(int, sys.argv[3:]))
    else:
        sys.exit(f"{verb}: expected start, stop, fail N or heal N")


if __name__ == "__main__":
    main()
