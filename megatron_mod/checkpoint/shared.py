"""A folder that the nodes of a job must share."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from megatron_mod.checkpoint.folders import writing
from megatron_mod.parallel.agree import on_first_rank

PREFIX = ".shared_"  # of the file that all look for; a killed job may leave it
SECONDS = 30.0  # that a file may take to appear on another node


def require_shared(folder: Path, *, what: str) -> None:
    """Refuse a folder in which not all ranks see what the first one writes; called by all alike.

    Args:
        folder: exists where the first rank runs.
        what: the setting that names it, for the message.

    Raises:
        ValueError: naming the hosts that do not see it.
    """
    if dist.get_world_size() == 1:
        return
    host = socket.gethostname()
    writer, name = on_first_rank(lambda: (host, _write(folder)))
    sees = dist.get_rank() == 0 or _appears(folder / name)
    blind: list = [None] * dist.get_world_size()
    dist.all_gather_object(blind, None if sees else host)
    on_first_rank(lambda: (folder / name).unlink(missing_ok=True))
    first = {host: rank for rank, host in reversed([*enumerate(blind)]) if host}
    if first:
        hosts = ", ".join(f"{host} (rank {rank})" for host, rank in sorted(first.items()))
        raise ValueError(
            f"{what}: what rank 0 writes there on {writer} is not seen on {hosts}; give a folder "
            "on a file system that all nodes share."
        )


def _write(folder: Path) -> str:
    name = PREFIX + uuid.uuid4().hex
    with writing(folder):
        (folder / name).touch()
    return name


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes in time: NFS keeps what a folder holds for a while."""
    deadline, pause = time.monotonic() + SECONDS, 0.05
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
        for above in reversed(path.absolute().parents):
            _ask_anew(above)
    return True


def _ask_anew(folder: Path) -> None:
    """Have the kernel ask an NFS server what a folder holds: opening does, looking does not."""
    with contextlib.suppress(OSError):
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
