"""Jobs under torchrun or without it, to be killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAULTY = "tests/helpers/faulty.py"


class Job:
    """A training that torchrun runs on ranks of this machine; its output goes to a file.

    Args:
        options: further ones of torchrun's.
        fault: environment of tests/helpers/faulty.py, which is run then.
    """

    def __init__(
        self,
        arguments: list[str],
        *,
        ranks: int,
        log: Path,
        options: Sequence[str] = (),
        fault: Mapping[str, str] | None = None,
    ) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
        script = FAULTY if fault else "launch/pretrain_router.py"
        command += ["--nproc_per_node", str(ranks), script, *arguments]
        self.log = log
        threads = {**os.environ, "OMP_NUM_THREADS": "1", **(fault or {})}
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=threads)

    def ranks(self) -> list[int]:
        """The ranks' processes."""
        return [pid for pid in descendants(self.process.pid) if b"pretrain_router" in cmdline(pid)]

    def rank(self, number: int) -> int:
        """The process of one rank."""
        wanted = f"RANK={number}".encode()
        (pid,) = (
            pid
            for pid in self.ranks()
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        )
        return pid

    def kill(self, pid: int) -> None:
        """``kill -9`` one process, and fail if one of the job's others goes on."""
        everyone = {self.process.pid, *descendants(self.process.pid)}
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while (alive := {p for p in everyone if is_alive(p)}) and time.monotonic() < deadline:
            self.process.poll()  # or it would stay as a zombie
            time.sleep(0.05)
        for left in alive:
            os.kill(left, signal.SIGKILL)
        assert not alive, f"processes of the job that go on: {[cmdline(p) for p in alive]}"

    def finish(self, *, seconds: int = 300) -> str:
        """Wait for the end, which has to be a success; the output."""
        text = self.ends(seconds=seconds)
        assert self.process.returncode == 0, text
        return text

    def ends(self, *, seconds: int = 300) -> str:
        """Wait for the end of all processes; the output."""
        everyone = {self.process.pid, *descendants(self.process.pid)}
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            for pid in everyone:
                os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"goes on: {self.log.read_text(errors='replace')}") from None
        assert not [cmdline(pid) for pid in everyone if is_alive(pid)]
        return self.log.read_text(errors="replace")


def run_alone(
    arguments: list[str], *, ranks: int, folder: Path, fault: Mapping[str, str], seconds: int = 300
) -> list[tuple[int, str]]:
    """Exit status and output of each rank of tests/helpers/faulty.py, started without torchrun, as
    a batch system does.

    Ranks that are stopped have to end too.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), **address}
        with (folder / f"rank{rank}.log").open("wb") as out:
            started.append(
                subprocess.Popen(
                    [sys.executable, FAULTY, *arguments],
                    cwd=ROOT,
                    stdout=out,
                    stderr=out,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **own, **fault},
                )
            )
    deadline = time.monotonic() + seconds
    try:
        for process in started:
            process.wait(timeout=deadline - time.monotonic())
    finally:
        for process in started:
            process.kill()
    return [
        (process.returncode, (folder / f"rank{rank}.log").read_text())
        for rank, process in enumerate(started)
    ]


def descendants(pid: int) -> list[int]:
    """Every process below one, by the kernel's account."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        queue += (more := children.get(queue.pop(), []))
        found += more
    return found


def stat(pid: int) -> list[str]:
    """A process's state, parent, ... (proc_pid_stat(5) after the name), or nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    fields = stat(pid)
    return bool(fields) and fields[0] != "Z"


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_for_step(run: Path, step: int, *, seconds: int = 120) -> None:
    """Wait until a run has recorded a step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        path = run / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within {seconds} s")
