"""Keeping exactly a share of every document's tokens (Mixture-of-Depths, arXiv 2404.02258)."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from megatron_mod.routing.selection import count_chosen

_BITS = 24  # of a lot: as many as an fp32 number between 0 and 1 has


def top_k(
    scores: Tensor, document: Tensor, positions: Tensor, valid: Tensor, *, num_documents: int,
    capacity: float,
) -> Tensor:  # fmt: skip
    """Which tokens are kept: of a document's ``n`` valid ones the ``floor(capacity * n + 0.5)``
    with the largest scores, ties going to the lower position; without waiting for the device.

    Args:
        scores: fp32 ``[S, B]``.
        document: of each token, int64 ``[S, B]``; whole documents.
        positions: of each token in its document, int64 ``[S, B]``.
        valid: bool ``[S, B]``, that there is a token.

    Returns:
        bool ``[S, B]``.
    """
    flat_scores, flat_positions = scores.detach().flatten(), positions.flatten()
    owner = torch.where(valid, document, num_documents).flatten()
    order = flat_positions.argsort(stable=True)
    order = order[flat_scores[order].argsort(descending=True, stable=True)]
    order = order[owner[order].argsort(stable=True)]
    counts = count_chosen(valid, document, num_documents)
    kept = (capacity * counts.double() + 0.5).floor().long()
    ends = counts.cumsum(0)
    # What is no token comes after all documents, of which nothing is kept.
    first = torch.cat((ends - counts, ends[-1:]))
    kept = torch.cat((kept, kept.new_zeros(1)))
    owner = owner[order]
    rank = torch.arange(len(order), device=order.device) - first[owner]
    chosen = torch.zeros_like(valid.flatten()).scatter(0, order, rank < kept[owner])
    return chosen.view_as(valid)


def draw_lots(positions: Tensor, *, lot: int, layer: int) -> Tensor:
    """A number from 0 to 1, fp32, for each of these int64 positions: a function of position, layer
    and ``lot`` alone (SplitMix64, Steele et al. 2014)."""
    salt = random.Random(f"{lot} {layer}").getrandbits(62)
    mixed = (positions + salt) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        high = (mixed >> shift) & ((1 << (64 - shift)) - 1)  # without the sign, which >> repeats
        mixed = (mixed ^ high) * factor
    return ((mixed >> (64 - _BITS)) & ((1 << _BITS) - 1)).float() / (1 << _BITS)
