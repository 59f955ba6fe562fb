"""Folders that appear only when they are whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill that appears under ``path`` only when the block ends well.

    Raises:
        ValueError: ``path`` exists.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path}: already exists; remove it or give another output folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
