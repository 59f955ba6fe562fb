"""Output folders that are complete or absent, and have one writer."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill that appears under ``path`` only when the block ends well.

    It is filled under a hidden name; what a killed process left there is cleared first.

    Raises:
        ValueError: ``path`` exists, or another process is writing it.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path}: already exists; remove it or give another output folder.")
    partial = path.with_name(f".{path.name}.incomplete")
    partial.mkdir(parents=True, exist_ok=True)
    with only_writer(partial, what=str(path)):
        try:
            for left in partial.iterdir():
                remove(left)
            yield partial
            publish(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def only_writer(folder: Path, *, what: str) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{what}: another process is writing to this folder; wait for it to end, or give "
                "another output folder."
            ) from None
        yield
    finally:
        os.close(handle)


def publish(partial: Path, path: Path) -> None:
    """Make a filled folder durable, then visible under its own name by one rename."""
    for folder, _, files in os.walk(partial):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))
    partial.rename(path)
    _sync(path.parent)


def write_durably(path: Path, text: str) -> None:
    """Replace a small file by one rename."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    _sync(new)
    new.rename(path)
    _sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder; a folder loses its name first, so that none is ever half there."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    hidden = path
    if not path.name.startswith("."):
        hidden = path.with_name(f".{path.name}.removed")
        path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


class ChunkedFile(io.BufferedWriter):
    """A new file that passes large writes to the kernel a piece at a time.

    Measured on ext4: half a gigabyte in one write takes two to six times as long as in pieces.
    """

    PIECE = 2**20

    def __init__(self, path: str | Path) -> None:
        super().__init__(io.FileIO(path, "wb"))

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), self.PIECE):
            super().write(view[start : start + self.PIECE])
        return len(view)


def files_below(folder: Path) -> list[str]:
    """Every file of a folder, relative to it."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
