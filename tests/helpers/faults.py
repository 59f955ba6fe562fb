"""Faults to put into folders at random; a seed repeats them."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_mod.commands.command import mistakes_told

SEED = int(os.environ.get("FAULTS_SEED", "11"))


@dataclass(frozen=True)
class Flip:
    """One bit of a byte of a file, which is named relative to its folder."""

    file: str
    position: int
    bit: int

    def apply(self, folder: Path) -> None:
        with (folder / self.file).open("r+b") as file:
            file.seek(self.position)
            (byte,) = file.read(1)
            file.seek(self.position)
            file.write(bytes([byte ^ (1 << self.bit)]))


def random_flip(folder: Path, file: str, generator: random.Random) -> Flip:
    size = (folder / file).stat().st_size
    return Flip(file, int(generator.random() * size), generator.randrange(8))


def files_with_content(folder: Path) -> list[str]:
    """The files of a folder in which a byte can be flipped, relative to it."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def wait_until(begun: Callable[[], bool], job: subprocess.Popen, *, seconds: float = 200) -> None:
    """Wait until something that may last a millisecond has begun, or the job has ended."""
    deadline = time.monotonic() + seconds
    while not begun() and job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def told(work: Callable[[], object], capsys: pytest.CaptureFixture) -> tuple[object, str]:
    """What some work comes to, and what it says; ``None`` and the message where it ends with one,
    as the commands do."""
    capsys.readouterr()
    result, status = None, 0
    try:
        with mistakes_told():
            result = work()
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr()
    if not status:
        return result, said.out + said.err
    before, _, message = said.err.partition("error: ")
    assert status == 2
    assert message.count("\n") == 1, said.err
    assert "Traceback" not in before
    return None, message
