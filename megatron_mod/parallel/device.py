"""The one place that knows whether this process computes on a GPU or on the CPU."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import resource
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from megatron_mod.parallel import compiling, optional

HAS_GPU = torch.cuda.is_available()


def prepare() -> None:
    """Ready ``torch`` for Megatron-core on this machine; call before importing Megatron-core."""
    for absent in ("apex", "Apex", "Transformer Engine", "transformer_engine", "TransformerEngine"):
        warnings.filterwarnings("ignore", message=f".*{absent}.*")
    for harmless in (
        ".*flash_attn.*",
        "full scope is deprecated.*",
        "`load_state_dict` is deprecated.*",
        "`torch.distributed.* is deprecated.*",
        ".*absl.logging is not installed.*",
        ".*using the device under current context.*",  # which select has set
    ):
        warnings.filterwarnings("ignore", message=harmless)
    megatron = logging.getLogger("megatron.core")
    if megatron.level == logging.NOTSET:  # nobody wants more of it
        megatron.setLevel(logging.ERROR)
    compiling.put_off()
    optional.guard(has_gpu=HAS_GPU)
    if not HAS_GPU:
        from megatron_mod.parallel import cpu

        cpu.install()


def select(*, with_megatron: bool = True) -> None:
    """Take this rank's device; call before groups are made.

    ``with_megatron``: whether Megatron-core is going to be used.

    Raises:
        ValueError: more ranks on this machine than GPUs.
    """
    if not HAS_GPU:
        from megatron_mod.parallel import cpu

        if with_megatron:
            cpu.patch_megatron()
        return
    local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= count:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)
        raise ValueError(
            f"torchrun --nproc_per_node {ranks}: this machine has {count} GPU(s) and every rank "
            f"needs its own; start {count} rank(s) here, or hide the GPUs (CUDA_VISIBLE_DEVICES=) "
            "to compute on the CPU."
        )
    torch.cuda.set_device(local_rank)


def device() -> torch.device:
    """Where this process keeps its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")


def collective_backend() -> str:
    """The ``torch.distributed`` back end for this device."""
    return "nccl" if HAS_GPU else "gloo"


def is_capturing() -> bool:
    """Whether what the device is told now becomes part of a CUDA graph."""
    return HAS_GPU and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Have equal inputs give equal results, to the last bit, for the block, where ``wanted``: on a
    GPU the backward pass of attention adds up in any order otherwise. A CPU does so anyway.

    Models are built in the block too: Transformer Engine's attention asks once.
    """
    if not (wanted and HAS_GPU):
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by torch with it
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = False  # nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fills


def synchronize() -> None:
    """Wait for the device: what is timed is then finished."""
    if HAS_GPU:
        torch.cuda.synchronize()


def memory() -> int:
    """Bytes of memory that tensors here can have: the GPU's, or the machine's."""
    if HAS_GPU:
        return torch.cuda.get_device_properties(device()).total_memory
    return machine_memory()


def memory_in_use() -> tuple[int, int]:
    """Bytes that are taken now, and were at most: by tensors on the GPU, or by this process."""
    if HAS_GPU:
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    now = psutil.Process().memory_info().rss
    return now, max(now, peak * (1 if sys.platform == "darwin" else 1024))


def machine_memory() -> int:
    """Bytes of the machine's own memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe() -> str:
    """The device in words, for reports."""
    if HAS_GPU:
        return torch.cuda.get_device_name()
    return f"cpu ({_processor()}, {os.cpu_count()} cores)"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.split(":", 1)[1].strip() for line in info if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
