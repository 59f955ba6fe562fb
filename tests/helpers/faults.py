"""Faults to put into folders at random; a seed repeats them."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

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
