"""How the scripts here start ranks on this machine."""

from __future__ import annotations

import os
import sys


def gpu_count() -> int:
    """GPUs of this machine; every rank needs its own."""
    import torch

    return torch.cuda.device_count()


def torchrun(nproc: int, *, port: int | None = None) -> tuple[list[str], dict[str, str]]:
    """The start of a command, which a script and its options follow, and its environment: the cores
    are shared out between the ranks.

    Args:
        port: where the ranks meet; ``None``: a free one.
    """
    where = ["--standalone"]
    if port is not None:
        where = ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=one_node"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *where,
        "--nproc_per_node",
        str(nproc),
    ]
    threads = str(max(1, (os.cpu_count() or 1) // nproc))
    return command, {"OMP_NUM_THREADS": threads, **os.environ}
