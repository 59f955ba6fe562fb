"""A training in a process of its own that may take only so much of a GPU's memory."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path


def train_within(
    memory_gb: float, arguments: Sequence[str], run: Path, connection: Connection
) -> None:
    """Run a training that its command line's ``arguments`` describe, into the folder ``run``; sends
    its peak of memory ``peak_gb`` (as the allocator reserved it, of 1e9 bytes) and seconds, or why
    it ``failed``. On a CPU nothing is limited."""
    import torch

    from megatron_mod.commands.train import main

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * 1e9 / total))
    began = time.perf_counter()
    found: dict[str, object] = {}
    try:
        main(list(arguments))
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found["last_step"] = json.loads(lines[-1])
    except (Exception, SystemExit) as error:  # its message is all that is asked for
        found["failed"] = f"{type(error).__name__}: {error}"
    if torch.cuda.is_available():
        found["peak_gb"] = torch.cuda.max_memory_reserved() / 1e9
    connection.send({**found, "seconds": time.perf_counter() - began})
