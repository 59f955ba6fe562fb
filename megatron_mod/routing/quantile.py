"""Borders that keep a wanted share of logits that many ranks hold parts of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BINS, ROUNDS = 512, 3  # of a histogram that is narrowed down, to 1e-8 of the range of all
TIE = 1e-6  # logits that differ by less do so by rounding
MARGIN = 0.05  # below the least logit where everything is kept


def borders(
    scores: Tensor,
    shares: Tensor,
    *,
    together: bool,
    add_up: Callable[[Tensor], Tensor],
    largest: Callable[[Tensor], Tensor],
) -> Tensor:
    """The logit of each layer from which on a share of its units is kept, fp64 ``[L]``.

    It lies half way between the least logit that is kept and the next below it, so that neither
    rounding nor a few units more or less than a share allows decide which side a unit is on. Units
    of one logit, to rounding, are kept or skipped together; a border that would part them keeps
    them. Without a unit it is 0. Nothing waits for the device.

    Args:
        scores: fp32 ``[L, N]`` of the units that this rank holds; NaN where there is none.
        shares: wanted of each layer's units ``[L]``; ``together``: their mean of all layers' units,
            with one border for all.
        add_up, largest: int64 or fp64 tensors over all ranks, elementwise.
    """
    layers = len(scores)
    if together:
        scores, shares = scores.reshape(1, -1), shares.mean().reshape(1)
    scores = scores.double()
    exists = scores.isfinite()

    def ends(of: Tensor, under: Tensor) -> tuple[Tensor, Tensor]:
        """The least score of some, and the largest of others, of all ranks."""
        least = scores.masked_fill(~of, torch.inf).amin(-1)
        top = scores.masked_fill(~under, -torch.inf).amax(-1)
        both = largest(torch.stack((-least, top)))
        return -both[0], both[1]

    low, high = ends(exists, exists)
    wanted = shares.double() * add_up(exists.sum(-1))
    above = torch.zeros_like(wanted)
    for _ in range(ROUNDS):
        width = (high - low) / BINS
        place = ((scores - low[:, None]) / width.clamp(min=1e-300)[:, None]).floor()
        inside = exists & (scores >= low[:, None]) & (scores <= high[:, None])
        place = place.nan_to_num(0.0).clamp(0, BINS - 1).long()
        counts = torch.zeros(len(scores), BINS, dtype=torch.int64, device=scores.device)
        counts = add_up(counts.scatter_add_(1, place, inside.long()))
        from_top = counts.flip(-1)
        so_far = above[:, None] + from_top.cumsum(-1)
        index = (so_far < wanted[:, None]).sum(-1, keepdim=True).clamp(max=BINS - 1)
        above = (so_far - from_top).gather(1, index)[:, 0]
        low = low + (BINS - 1 - index[:, 0]) * width
        high = low + width
    kept = scores >= low[:, None] - TIE
    least, below = ends(exists & kept, exists & ~kept)
    found = torch.where(below.isfinite(), (least + below) / 2, least - MARGIN)
    return found.nan_to_num(0.0, posinf=0.0, neginf=0.0).expand(layers)
