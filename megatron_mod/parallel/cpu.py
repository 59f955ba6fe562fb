"""Lets Megatron-core run on a machine without a GPU.

Megatron-core asks ``torch.cuda`` for its device, its streams and its random
state, whatever the process groups' back end is. ``install()`` makes those
calls answer for the CPU, before Megatron-core is imported (some of its modules
bind functions when they load); ``patch_megatron()`` completes it afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

import torch

CPU = torch.device("cpu")
_FACTORIES = (
    "empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint",
    "randperm", "linspace", "eye", "as_tensor", "empty_like", "zeros_like", "ones_like",
)  # fmt: skip
_installed = False


class _Inert:
    """Stands in for ``torch.cuda.Stream`` and ``torch.cuda.Event``: all work is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        return 0.0

    def record_event(self, event: object = None) -> object:
        return event if event is not None else _Inert()

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    record = wait = synchronize = wait_event = wait_stream = _nothing


def _names_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def _on_cpu(factory: Any) -> Any:
    """Wrap a tensor factory so that ``device='cuda'`` and ``pin_memory=True`` mean the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _unmoved(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def _cuda_type(original: Any) -> Any:
    """``Tensor.type()`` as Megatron's optimizers assert it: ``torch.cuda.FloatTensor``."""

    def tensor_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(tensor, *args, **kwargs)
        if isinstance(name, str) and not name.startswith("torch.cuda."):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    return tensor_type


def _patch_torch() -> None:
    cuda = torch.cuda
    # The first use of a device context lists the factories it governs. It must list the
    # originals, or `with torch.device("meta")` (Transformers' loading) would govern nothing.
    with torch.device("cpu"):
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.Stream = cuda.Event = _Inert
    cuda.current_stream = cuda.default_stream = lambda device=None: _Inert()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(
        state
    )
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda.manual_seed_all = lambda seed: None  # torch.manual_seed calls it after seeding the CPU
    cuda.nvtx.range_push = cuda.nvtx.range_pop = cuda.nvtx.mark = lambda *args: None
    torch.Tensor.cuda = torch.nn.Module.cuda = _unmoved
    torch.Tensor.type = _cuda_type(torch.Tensor.type)


def patch_megatron() -> None:
    """Point Megatron's own random-state functions, which go past ``torch.cuda``, to the CPU's."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # It warns of the CPU's numbers drawn in the place of a GPU's.
    logging.getLogger(random.__name__).addFilter(_is_no_draw)


def _is_no_draw(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("CPU RNG state changed")


def install() -> None:
    """Make ``torch.cuda``'s calls answer for the CPU; safe to call more than once."""
    global _installed
    if _installed:
        return
    _installed = True
    _patch_torch()
