"""A folder that nodes do not share: a rank with a disk, and a host name, of its own."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from megatron_mod.checkpoint import shared
from tests.helpers.ranks import run_ranks

NEW_MOUNTS, NEW_NAME = 0x00020000, 0x04000000  # CLONE_NEWNS, CLONE_NEWUTS of <linux/sched.h>


def look(common: Path, own: Path) -> str:
    """Look in a folder that both ranks have, and in one that each has of its own; the message."""
    if os.environ["RANK"] == "1":
        assert ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS | NEW_NAME) == 0
        for command in ("mount --make-rprivate /", f"mount -t tmpfs none {own}"):
            subprocess.run(command.split(), check=True)
        socket.sethostname("elsewhere")
    from megatron_mod.parallel import topology

    ranks = topology.plan(tensor=1, pipeline=1, world_size=2)
    topology.initialize(ranks, init_method=os.environ["MEET"], with_megatron=False)
    shared.require_shared(common, what="checkpoint.save = common")
    shared.SECONDS = 0.2
    with pytest.raises(ValueError) as caught:
        shared.require_shared(own, what="checkpoint.save = own")
    assert not any(own.iterdir())
    return str(caught.value)


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True).returncode != 0,
    reason="this user may not mount anything",
)
def test_every_rank_names_the_host_that_does_not_see_it(tmp_path):
    folders = [tmp_path / "common", tmp_path / "own"]
    for folder in folders:
        folder.mkdir()
    said = run_ranks(look, *folders, world=2, folder=tmp_path / "ranks")
    assert said == 2 * [
        f"checkpoint.save = own: what rank 0 writes there on {socket.gethostname()} is not seen on "
        "elsewhere (rank 1); give a folder on a file system that all nodes share."
    ]
    assert not any(any(folder.iterdir()) for folder in folders)


def test_what_comes_late_is_waited_for(tmp_path):
    folder = tmp_path / "new"

    def come() -> None:
        folder.mkdir()
        (folder / "file").touch()

    timer = threading.Timer(0.3, come)
    timer.start()
    assert shared._appears(folder / "file")
    timer.join()
