"""Ranks that fail together instead of waiting for one that has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mod.parallel import device

T = TypeVar("T")


def on_first_rank(function: Callable[[], T]) -> T:
    """Call a function on rank 0 and return, or raise, what it did there on every rank."""
    answer: list = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    value, error = answer
    if error is not None:
        raise error
    return value


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise on every rank what the block, in which ranks do not wait for one another, raised on
    some; entered by all ranks alike.

    Raises:
        ValueError: the first rank's that had one.
    """
    fault = None
    try:
        yield
    except ValueError as error:
        fault = error
    faults: list = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault and str(fault))
    if first := next(filter(None, faults), None):
        raise ValueError(first) from fault


def largest(*values: float | Tensor) -> list[float]:
    """The largest of each value (a scalar) over all ranks, in one message; waits for the device."""
    scalars = [
        v.float() if isinstance(v, Tensor) else torch.full((), float(v), device=device.device())
        for v in values
    ]
    found = torch.stack(scalars)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def of_every_rank(values: Sequence[float]) -> list[list[float]]:
    """The values of each rank, by rank; called by all ranks with as many; waits for the device."""
    mine = torch.tensor(values, dtype=torch.float64, device=device.device())
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return torch.stack(found).tolist()
