"""This machine as a kind of device."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_mod.estimate.gpus import CPU, GB, KINDS, Kind
from megatron_mod.estimate.matmul import matmul_rate
from megatron_mod.estimate.placed import Placed
from megatron_mod.parallel import device

NAMES = {  # part of a device's name -> kind, the first that fits
    "A100-SXM4-40": "a100-40", "A100-PCIE-40": "a100-40", "A100": "a100-80", "H200": "h200",
    "H100": "h100", "L4": "l4", "A10": "a10", "3090": "3090", "4090": "4090",
}  # fmt: skip
REACHED = 0.9  # of a plain product's rate, by a training; measured, tools/benchmark/RESULTS.md
PROCESS = 0.95 * GB  # that a rank holds beside its tensors; as REACHED
LINK = 1.0 * GB  # between processes of a machine by gloo, assumed


def cpu(placed: Placed, *, ranks: int) -> Kind:
    """The processor of this machine, shared by so many ranks; its rate is measured, with a
    product as large as a micro-batch's."""
    arch, dtype = placed.job.arch, getattr(torch, placed.job.config.model.dtype)
    rate = matmul_rate(placed.tokens, arch.hidden_size, arch.ffn_hidden_size, dtype=dtype)
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


def gpu() -> Kind | None:
    """The GPU of this machine with its own memory, or one with the numbers of no known kind;
    ``None``: there is none."""
    if not device.HAS_GPU:
        return None
    name = device.describe()
    known = next((kind for part, kind in NAMES.items() if part in name), "a10")
    return replace(KINDS[known], name=name, memory=device.memory())
