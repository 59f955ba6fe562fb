"""Ranks that fail together instead of waiting for one that has failed."""

from __future__ import annotations

from collections.abc import Callable
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


def largest(*values: float | Tensor) -> list[float]:
    """The largest of each value (a scalar) over all ranks, in one message; waits for the device."""
    scalars = [
        v.float() if isinstance(v, Tensor) else torch.full((), float(v), device=device.device())
        for v in values
    ]
    found = torch.stack(scalars)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()
