"""Where tests of GPUs run: their bodies are the same on a CPU, where few run unless asked."""

from __future__ import annotations

import contextlib
import os

import pytest

from megatron_mod.parallel import device
from tests.helpers.engine_on_cpu import engine_error, engine_on_cpu

HAS_GPU = device.HAS_GPU
ON_CPU = "MEGATRON_MOD_GPU_TESTS_ON_CPU"  # 1: run on the CPU all that can
ALL = HAS_GPU or os.environ.get(ON_CPU) == "1"

only_cuda = pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
long_on_cpu = pytest.mark.skipif(not ALL, reason=f"no CUDA device ({ON_CPU}=1: on the CPU)")


@contextlib.contextmanager
def layers_of(implementation: str):
    """For the block, layers of an implementation can be built and run; skips without it. On a CPU
    torch computes what Transformer Engine would."""
    if implementation != "transformer_engine":
        yield
        return
    if error := engine_error():
        pytest.skip(error)
    with contextlib.nullcontext() if HAS_GPU else engine_on_cpu():
        yield
