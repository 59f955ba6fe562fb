"""Batch jobs on the SLURM of tests/slurm/run.sh."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.helpers.jobs import ROOT, cmdline, stat

SCRIPTS = ROOT / "launch" / "slurm"
SECONDS = 1200  # of a machine with other things to do
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


class Batch:
    """A job of one of our scripts, submitted from a folder of its own."""

    def __init__(
        self,
        script: str,
        *arguments: object,
        folder: Path,
        options: tuple[str, ...] = (),
        **environment: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"
        done = sbatch(
            f"--output={self.log}", *options, SCRIPTS / script, *arguments,
            folder=folder, **environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def field(self, name: str) -> str:
        """What ``scontrol show job`` says of the job: ``JobState``, ``Restarts`` ..."""
        shown = run("scontrol", "--oneliner", "show", "job", self.number).stdout
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found, shown
        return found[1]

    def says(self, wanted: str) -> str:
        """Wait until the output has a text; the output."""
        return self.waits_for(lambda: wanted in self.text(), wanted)

    def ends(self) -> str:
        """Wait until the job has left the queue for good; the output."""
        return self.waits_for(lambda: self.field("JobState") in ENDED, "its end")

    def waits_for(self, is_so: Callable[[], bool], what: str) -> str:
        deadline = time.monotonic() + SECONDS
        while not is_so():
            state = run("scontrol", "show", "job", self.number).stdout
            assert time.monotonic() < deadline, f"no {what}:\n{self.text()}\n{state}"
            time.sleep(0.5)
        return self.text()

    def status(self) -> int:
        """The exit status of a script that has ended by itself."""
        status, number = self.field("ExitCode").split(":")
        return int(status) or 128 * (number != "0") + int(number)

    def cancel(self, *options: str) -> None:
        run("scancel", *options, self.number)

    def ranks(self) -> dict[int, int]:
        """The processes of the job's ranks, by their number."""
        found = {}
        for pid, words in environments():
            of_job = f"SLURM_JOB_ID={self.number}" in words and b"pretrain_router" in cmdline(pid)
            rank = [word.removeprefix("RANK=") for word in words if word.startswith("RANK=")]
            if of_job and rank:
                found[int(rank[0])] = pid
        return found


def run(*command: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


def sbatch(*arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return run("sbatch", "--parsable", *arguments, cwd=folder, env={**os.environ, **environment})


def clear_queue() -> None:
    """Cancel what a test left."""
    run("scancel", "--me")
    while run("squeue", "--noheader", "--me").stdout:
        time.sleep(0.5)


def played(path: Path, text: str) -> str:
    """A program in bash that stands in for the interpreter, ``$real``."""
    path.write_text(f"#!/bin/bash\nreal={sys.executable}\n{text}\n")
    path.chmod(0o755)
    return str(path)


def node_daemon(name: str) -> int:
    """The process of a node's slurmd."""
    return int(Path(os.environ["SLURM_CONF"]).with_name(f"slurmd-{name}.pid").read_text())


def lose_node(name: str) -> None:
    """End all that runs on a node at once, as when its power goes."""
    marks = {f"SLURMD_NODENAME={name}", f"SLURM_CONF={os.environ['SLURM_CONF']}"}
    tasks = [pid for pid, words in environments() if marks <= words]
    steps = {int(fields[1]) for pid in tasks if (fields := stat(pid))}
    for pid in [node_daemon(name), *(s for s in steps if b"slurmstepd" in cmdline(s)), *tasks]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def environments() -> Iterator[tuple[int, set[str]]]:
    """Each process that can be looked into, and its environment."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                text = (folder / "environ").read_bytes().decode(errors="replace")
                yield int(folder.name), set(text.split("\0"))


def return_node(name: str) -> None:
    run("slurmd", "-f", os.environ["SLURM_CONF"], "-N", name, check=True)
