"""What ranks that share a device run; imported by name in every rank."""

from __future__ import annotations

from tests.distributed import cases
from tests.gpu.where import layers_of


def gradients(implementation: str, *args: object) -> dict:
    """``cases.gradients``, with layers of an implementation."""
    with layers_of(implementation):
        return cases.gradients(*args)
