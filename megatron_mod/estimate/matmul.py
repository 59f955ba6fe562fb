"""How fast this machine multiplies matrices."""

from __future__ import annotations

import time

import torch

SECONDS = 0.2  # for which products are repeated


def matmul_rate(tokens: int, hidden: int, ffn: int, *, dtype: torch.dtype) -> float:
    """Operations a second of plain products ``[tokens, hidden] x [hidden, ffn]``, an MLP's first,
    on this process's device and threads."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left = torch.randn(tokens, hidden, dtype=dtype, device=device)
    right = torch.randn(hidden, ffn, dtype=dtype, device=device)
    left @ right
    count = 0
    synchronize()
    started = time.perf_counter()
    while (seconds := time.perf_counter() - started) < SECONDS:
        left @ right
        synchronize()
        count += 1
    return count * 2 * tokens * hidden * ffn / seconds


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
