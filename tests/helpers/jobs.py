"""Jobs under torchrun, to be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Job:
    """A training that torchrun runs on ranks of this machine; its output goes to a file."""

    def __init__(self, arguments: list[str], *, ranks: int, log: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(ranks), "launch/pretrain_router.py", *arguments]
        self.log = log
        threads = {**os.environ, "OMP_NUM_THREADS": "1"}
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
