"""Process groups from parallel degrees."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_mod import verbosity
from megatron_mod.config.ranks import check_ranks
from megatron_mod.parallel import device
from megatron_mod.parallel.heartbeat import Heartbeat
from megatron_mod.process import Stopped

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

TIMEOUT = 10.0  # minutes
_store: dist.Store | None = None
_heartbeat: Heartbeat | None = None


@dataclass(frozen=True)
class Topology:
    """How a job's ranks are laid out: ``world_size = tensor * pipeline * context * data``.

    Each layer's experts are shared by ``expert`` of the ranks that are data or context parallel.

    Args:
        virtual_pipeline: model chunks each pipeline rank holds (``None``: one stage).
        pipeline_layout: layers of each stage in the model's order, with a virtual pipeline of each
            chunk (``None``: what suits a forward pass).
        sequence_parallel: tensor-parallel ranks also split the sequence between layers.
    """

    tensor: int
    pipeline: int
    data: int
    context: int = 1
    virtual_pipeline: int | None = None
    sequence_parallel: bool = False
    pipeline_layout: tuple[int, ...] | None = None
    expert: int = 1

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def stages(self) -> int:
        """The parts that the layers are cut into."""
        return self.pipeline * (self.virtual_pipeline or 1)

    def to_dict(self) -> dict[str, int]:
        degrees = {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data}
        more = {"context": self.context, "expert": self.expert}
        return degrees | {name: degree for name, degree in more.items() if degree > 1}


ONE_RANK = Topology(tensor=1, pipeline=1, data=1)


def plan(
    *,
    tensor: int,
    pipeline: int,
    world_size: int,
    context: int = 1,
    virtual_pipeline: int | None = None,
    sequence_parallel: bool = False,
    expert: int = 1,
) -> Topology:
    """The layout of ``world_size`` ranks; what the degrees leave over is data parallel.

    Raises:
        ValueError: the degrees do not divide the world size.
    """
    degrees = {"tensor": tensor, "pipeline": pipeline, "context": context}
    check_ranks(degrees, world_size=world_size, expert=expert)
    data = world_size // math.prod(degrees.values())
    return Topology(
        tensor, pipeline, data, context, virtual_pipeline, sequence_parallel, expert=expert
    )


def environment_world_size() -> int:
    """The ranks ``torchrun`` started (1 without it)."""
    return int(os.environ.get("WORLD_SIZE", 1))


def meet(*, minutes: float = TIMEOUT, setting: str = "") -> None:
    """Wait for the ranks that ``torchrun`` started, and listen for them from now on.

    ``initialize`` does it otherwise; what comes between, such as waiting for data that another rank
    prepares, is not listened through then.

    Args:
        minutes: that a rank may take to answer, here and later; the job ends with its name then.
        setting: what the user calls that.

    Raises:
        ValueError: ranks that do not come.
    """
    global _store, _heartbeat
    if _store is not None or "MASTER_ADDR" not in os.environ:
        return
    rank, world_size = int(os.environ.get("RANK", 0)), environment_world_size()
    limit = f"{setting} = {minutes:g} minutes" if setting else f"{minutes:g} minutes"
    _store = _connect("ranks", minutes=minutes, limit=limit, may_hold=rank == 0)
    if world_size > 1:
        _heartbeat = Heartbeat(
            partial(_connect, "heartbeat", minutes=minutes, limit=limit),
            rank=rank,
            world_size=world_size,
            minutes=minutes,
            limit=limit,
        )


def _connect(name: str, *, minutes: float, limit: str, may_hold: bool = False) -> dist.Store:
    """A connection to the job's store, held by torchrun or else by the rank that ``may_hold`` it;
    what torchrun restarts shares nothing with what failed before.

    Raises:
        ValueError: it is not there in time.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    try:
        store = dist.TCPStore(
            host,
            port,
            is_master=may_hold and not by_torchrun,
            wait_for_workers=False,
            timeout=timedelta(minutes=minutes),
            multi_tenant=True,
        )
    except dist.DistError as error:
        whose = "torchrun" if by_torchrun else "rank 0"
        raise ValueError(
            f"MASTER_ADDR = {host}, MASTER_PORT = {port}: {whose} was not to be found there within "
            f"{limit}: not started, stopped, or at another address. ({str(error).splitlines()[0]})"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"megatron_mod/{name}/{attempt}", store)


def initialize(
    topology: Topology,
    *,
    seed: int = 0,
    init_method: str | None = None,
    minutes: float = TIMEOUT,
    setting: str = "",
    with_megatron: bool = True,
) -> None:
    """Join the job and create Megatron's process groups.

    Without ``torchrun`` (and its environment) only a world of one rank can be made;
    ``init_method`` as in ``torch.distributed`` overrides how ranks meet.

    Args:
        minutes, setting: as in ``meet``; every group's collectives fail after so many minutes too.
        with_megatron: whether Megatron-core is used, whose import takes seconds; without, there are
            no groups but that of all ranks.

    Raises:
        ValueError: more ranks on this machine than GPUs, or ranks that do not come.
    """
    device.select(with_megatron=with_megatron)
    if not dist.is_initialized():
        if init_method is None:
            meet(minutes=minutes, setting=setting)
            how = {"store": _store or dist.HashStore()}
        else:
            how = {"init_method": init_method}
        dist.init_process_group(
            device.collective_backend(),
            **how,
            rank=int(os.environ.get("RANK", 0)),
            world_size=topology.world_size,
            timeout=timedelta(minutes=minutes),
        )
    torch.manual_seed(seed)
    if not with_megatron:
        return
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tensor,
        pipeline_model_parallel_size=topology.pipeline,
        virtual_pipeline_model_parallel_size=topology.virtual_pipeline,
        context_parallel_size=topology.context,
        expert_model_parallel_size=topology.expert,
        distributed_timeout_minutes=minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if _heartbeat is not None:
        _heartbeat.stage = parallel_state.get_pipeline_model_parallel_rank()


def process_groups() -> ProcessGroupCollection:
    """The groups that ``initialize`` made this rank a member of."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


@contextlib.contextmanager
def joined(topology: Topology, **options: object) -> Iterator[None]:
    """``initialize`` and, unless the block fails, ``shutdown``."""
    initialize(topology, **options)
    try:
        yield
    except Stopped:
        shutdown()
        raise
    shutdown()


def at(place: str) -> None:
    """Note how far this rank has come; said when ranks lose one another."""
    if _heartbeat is not None:
        _heartbeat.at = place


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """A world of one rank for the block: what reads and writes distributed checkpoints needs."""
    initialize(plan(tensor=1, pipeline=1, world_size=1))
    try:
        yield
    finally:
        shutdown()


def shutdown() -> None:
    """Leave the job together; the process can join another afterwards."""
    global _store, _heartbeat
    if _heartbeat is not None:
        dist.barrier()  # torchrun would wait for one that stops here for ever
        _heartbeat.stop()
    _store = _heartbeat = None
    if "megatron.core" in sys.modules:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def print_once(text: str, *, level: int = logging.INFO) -> None:
    """Print on rank 0 what is of such a level (of ``logging``), if that is wanted."""
    if dist.get_rank() == 0 and verbosity.says(level):
        print(text, flush=True)


def write_once(path: Path, text: str) -> None:
    """Write a file on rank 0."""
    if dist.get_rank() == 0:
        path.write_text(text, encoding="utf-8")
