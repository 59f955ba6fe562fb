"""This machine as a kind of device."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_mod.estimate.gpus import CPU, GB, KINDS, Kind, require_fp8
from megatron_mod.estimate.matmul import matmul_rate
from megatron_mod.estimate.placed import Placed
from megatron_mod.parallel import device, peak

REACHED = 0.9  # of a plain product's rate, by a training; measured, tools/benchmark/RESULTS.md
PROCESS = 0.95 * GB  # that a rank holds beside its tensors; as REACHED
LINK = 1.0 * GB  # between processes of a machine by gloo, assumed


def cpu(placed: Placed, *, ranks: int) -> Kind:
    """The processor of this machine, shared by so many ranks."""
    rate = _rate(placed)
    return Kind(
        CPU,
        bfloat16=rate,
        float32=rate,
        memory=device.machine_memory() // ranks,
        bandwidth=10 * GB,
        near=LINK,
        far=LINK,
        efficiency=REACHED,
        context=PROCESS,
        group=0.0,
        scattered=0.0,
    )


def gpu(placed: Placed) -> Kind:
    """The GPU of this machine: the known kind of its name with its own memory, or an unknown one,
    whose rate is measured and whose links are those of PCIe."""
    name, memory = device.describe(), device.memory()
    require_fp8(placed.job.config.model.fp8, name, _has_fp8)
    of_name = peak.named(name)
    known = [kind for kind in KINDS.values() if kind.name.partition("-")[0] == of_name]
    if known:
        nearest = min(known, key=lambda kind: abs(kind.memory - memory))
        return replace(nearest, name=name, memory=memory)
    rate = _rate(placed)
    return replace(
        KINDS["a10"], name=name, memory=memory, bfloat16=rate, float32=rate, efficiency=REACHED
    )


def _has_fp8() -> bool:
    """As Transformer Engine asks."""
    return torch.cuda.get_device_capability() >= (8, 9)


def _rate(placed: Placed) -> float:
    """Measured, of a product as large as a micro-batch's."""
    arch, dtype = placed.job.arch, getattr(torch, placed.job.config.model.dtype)
    return matmul_rate(placed.tokens, arch.hidden_size, arch.ffn_hidden_size, dtype=dtype)
