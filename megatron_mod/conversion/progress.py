"""A progress bar with bytes and time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def byte_progress(what: str, *, total: int) -> Iterator[Callable[[int], None]]:
    """Show ``what`` until ``total`` bytes are done; the block is given ``advance(bytes)``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=False),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)
