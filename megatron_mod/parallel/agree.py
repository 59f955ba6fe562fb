"""Ranks that fail together instead of waiting for one that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

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
