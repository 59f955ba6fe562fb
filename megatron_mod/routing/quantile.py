"""Borders that keep a wanted share of units whose logits many ranks hold parts of."""

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
    sizes: Tensor | None = None,
    spent: Callable[[Tensor, Tensor], Tensor] = lambda kept, valid: kept.sum(-1),
) -> Tensor:
    """The logit of each place from which on a share of its units is kept, fp64 ``[P]``.

    It lies half way between the least logit that is kept and the next below it, so that neither
    rounding nor a few units more or less than a share allows decide which side a unit is on. Units
    of one logit, to rounding, are kept or skipped together; a border that would part them keeps
    them. Without a unit it is 0. Nothing waits for the device.

    Args:
        scores: fp32 ``[P, N]`` of the units that this rank holds; NaN where there is none.
        shares: wanted of what each place's units cost ``[P]``; ``together``: their mean of what
            all places' do, with one border for all.
        add_up, largest: fp64 tensors over all ranks, elementwise.
        sizes: of the units, whole numbers (so that sums are exact) in fp64 ``[P, N, K]``; without
            one each.
        spent: what units cost that are kept ``[P, ..., K]`` of all ``[P, K]``, by their sizes:
            ``[P, ...]``, never less for more of them.
    """
    scores = scores.double()
    exists = scores.isfinite()
    sizes = exists[..., None].double() if sizes is None else sizes * exists[..., None]

    def ends(of: Tensor, under: Tensor) -> tuple[Tensor, Tensor]:
        """The least score of some, and the largest of others, of all ranks."""
        least = scores.masked_fill(~of, torch.inf).amin(-1)
        top = scores.masked_fill(~under, -torch.inf).amax(-1)
        both = torch.stack((-least, top))
        both = largest(both.amax(-1, keepdim=True) if together else both)
        return -both[0], both[1]

    low, high = ends(exists, exists)
    total = add_up(sizes.sum(1))
    wanted = spent(total, total)
    wanted = shares.mean().double() * wanted.sum()[None] if together else shares.double() * wanted
    above = torch.zeros_like(total)
    for _ in range(ROUNDS):
        width = (high - low) / BINS
        place = ((scores - low[:, None]) / width.clamp(min=1e-300)[:, None]).floor()
        inside = exists & (scores >= low[:, None]) & (scores <= high[:, None])
        place = place.nan_to_num(0.0).clamp(0, BINS - 1).long()
        bins = sizes.new_zeros(len(scores), BINS, sizes.shape[-1])
        bins.scatter_add_(1, place[..., None].expand_as(sizes), sizes * inside[..., None])
        from_top = add_up(bins).flip(1)
        so_far = above[:, None] + from_top.cumsum(1)
        costs = spent(so_far, total)
        costs = costs.sum(0, keepdim=True) if together else costs
        index = (costs < wanted[:, None]).sum(-1).clamp(max=BINS - 1)
        own = index.expand(len(scores))[:, None, None].expand(-1, 1, sizes.shape[-1])
        above = (so_far - from_top).gather(1, own)[:, 0]
        low = low + (BINS - 1 - index) * width
        high = low + width
    kept = scores >= low[:, None] - TIE
    least, below = ends(exists & kept, exists & ~kept)
    found = torch.where(below.isfinite(), (least + below) / 2, least - MARGIN)
    return found.nan_to_num(0.0, posinf=0.0, neginf=0.0).expand(len(scores))
