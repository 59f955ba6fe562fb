"""Runs a function on several ranks from an ordinary pytest test; they share the GPUs there are."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
import torch.multiprocessing as mp

_MEETINGS = count()
# What ranks need is imported once, in a process that they are forked from; not where there is a
# GPU, which a process must not have asked for when it forks.
_PRELOADED = ["tests.distributed.cases", "tests.distributed.resume_cases"]


def run_ranks(
    function: Callable, *args: object, world: int, folder: Path, seconds: int = 240
) -> list:
    """Call ``function(*args)`` on ``world`` ranks that can meet, and return what each returned.

    The function must be importable by name; process groups are its own business: ``meet``
    makes them. A rank that raises fails the test with its traceback; ranks that do not
    finish in time are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(_PRELOADED)
    processes = [
        context.Process(
            target=_rank, args=(function, args, rank, world, str(folder), dict(os.environ))
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        if any(p.exitcode not in (None, 0) for p in processes):
            time.sleep(1)  # let the other ranks report too
            break
        time.sleep(0.05)
    late = [rank for rank, p in enumerate(processes) if p.is_alive()]
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    errors = [path.read_text() for path in sorted(folder.glob("error-*.txt"))]
    assert not errors, "\n".join(errors)
    assert not late, f"ranks {late} did not finish within {seconds} s"
    assert all(p.exitcode == 0 for p in processes), [p.exitcode for p in processes]
    return [pickle.loads((folder / f"result-{r}.pkl").read_bytes()) for r in range(world)]


def _rank(
    function: Callable, args: tuple, rank: int, world: int, folder: str, environment: dict
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MEET"] = f"file://{folder}/store"
    torch.set_num_threads(1)
    from tests.helpers import shared_device

    if shared_device.is_needed(world):
        shared_device.share()
    try:
        result = function(*args)
        Path(folder, f"result-{rank}.pkl").write_bytes(pickle.dumps(result))
    except BaseException:
        Path(folder, f"error-{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise


def meet(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    virtual_pipeline: int | None = None,
    expert: int = 1,
):
    """Lay this job's ranks out (again, if they were); returns the topology.

    Groups of before are left: each has a thread that wakes a hundred times a second.
    """
    from megatron_mod.parallel import topology

    topology.shutdown()
    place = os.environ["MEET"] and f"{os.environ['MEET']}-{next(_MEETINGS)}"
    ranks = topology.plan(
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        virtual_pipeline=virtual_pipeline,
        expert=expert,
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    topology.initialize(ranks, init_method=place or None)
    return ranks
