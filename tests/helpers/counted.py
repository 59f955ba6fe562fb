"""What torch counts of a model's work."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode


def products(counter: FlopCounterMode) -> int:
    """Floating-point operations of all matrix products but the angles of rotary embeddings, which
    Transformers 4.57 makes by one and later releases do not."""
    angles = [
        sum(found.values())
        for module, found in counter.get_flop_counts().items()
        if module.endswith(".rotary_emb")
    ]
    return counter.get_total_flops() - sum(angles)
