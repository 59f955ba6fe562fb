"""Borders that keep a wanted share of logits that many ranks hold parts of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BINS, ROUNDS = 2048, 2  # of a histogram that is narrowed down: a border is right to 1e-7 of a range
MARGIN = 0.05  # below the least logit where everything is to be kept


def borders(
    scores: Tensor,
    shares: Tensor,
    *,
    together: bool,
    add_up: Callable[[Tensor], Tensor],
    largest: Callable[[Tensor], Tensor],
) -> Tensor:
    """The logit of each layer from which on a share of its units is kept, fp64 ``[L]``.

    Units of one score are kept or skipped together; a border that would part them keeps them.

    Args:
        scores: fp32 ``[L, N]`` of the units that this rank holds; NaN where there is none.
        shares: wanted of each layer's units ``[L]``; ``together``: their mean of all layers' units,
            with one border for all.
        add_up, largest: int64 or fp64 tensors over all ranks, elementwise.
    """
    layers, device = len(scores), scores.device
    if together:
        scores, shares = scores.reshape(1, -1), shares.mean().reshape(1)
    scores = scores.double()
    exists = scores.isfinite()
    ends = torch.stack(
        (
            scores.masked_fill(~exists, -torch.inf).amax(-1),
            -scores.masked_fill(~exists, torch.inf).amin(-1),
        )
    )
    high, low = largest(ends) * torch.tensor([[1.0], [-1.0]], device=device, dtype=torch.float64)
    everything = low - MARGIN
    wanted = shares.double().to(device) * add_up(exists.sum(-1)).double()
    above = torch.zeros_like(wanted)
    for _ in range(ROUNDS):
        width = (high - low) / BINS
        place = ((scores - low[:, None]) / width.clamp(min=1e-300)[:, None]).floor()
        inside = exists & (scores >= low[:, None]) & (scores <= high[:, None])
        place = place.nan_to_num(0.0).clamp(0, BINS - 1).long()
        counts = torch.zeros(len(scores), BINS, dtype=torch.int64, device=device)
        counts.scatter_add_(1, place, inside.long())
        counts = add_up(counts).double()
        from_top = above[:, None] + counts.flip(-1).cumsum(-1)
        index = (from_top < wanted[:, None]).sum(-1).clamp(max=BINS - 1)  # bins from the top
        above = above + counts.flip(-1).cumsum(-1).gather(1, index[:, None])[:, 0]
        above = above - counts.flip(-1).gather(1, index[:, None])[:, 0]
        low = low + (BINS - 1 - index) * width
        high = low + width
    found = torch.where(shares.to(device) >= 1, everything, low)
    return found.nan_to_num(0.0).expand(layers) if together else found.nan_to_num(0.0)
