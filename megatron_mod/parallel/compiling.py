"""Compiles Megatron-core's fused functions when they are called, not when it is imported.

Megatron-core decorates some dozens of functions with ``torch.compile``, hardly one of which our
configuration calls, and the decorator brings in all of torch's compiler: a third of the time that a
rank takes to start, and 70 MB.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

_compile = torch.compile


def put_off() -> None:
    """From now on; call before Megatron-core is imported."""
    torch.compile = _when_called


@functools.wraps(_compile)
def _when_called(model: Callable | None = None, **options: Any) -> Callable:
    if not isinstance(model, types.FunctionType):
        return _compile(model, **options)
    if not model.__module__.startswith("megatron.core."):
        return _compile(model, **options)
    compiled: Callable | None = None

    @functools.wraps(model)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        compiled = compiled or _compile(model, **options)
        return compiled(*args, **kwargs)

    return call
