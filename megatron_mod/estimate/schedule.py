"""How many micro-batches a rank has run forward and not yet backward."""

from __future__ import annotations

from collections.abc import Sequence


def most_kept(chunks: Sequence[int], *, rank: int, ranks: int, micro_batches: int) -> int:
    """The most that is kept for backward at a time on one rank of a pipeline.

    Megatron's schedule: so many forward passes first, then one forward and one backward in turn
    (1F1B; with several chunks, interleaved: Narayanan et al. 2021, arXiv 2104.04473, section 2.2).

    Args:
        chunks: what a micro-batch keeps in each of the rank's parts of the model.
        micro_batches: of a step; with several chunks a multiple of ``ranks``.
    """
    passes = micro_batches * len(chunks)
    ahead = ranks - rank - 1
    if len(chunks) > 1:
        ahead = 2 * ahead + (len(chunks) - 1) * ranks
    ahead = min(ahead, passes)
    kept = most = 0
    for number in range(passes):
        kept += chunks[_chunk(number, ranks, len(chunks))]
        most = max(most, kept)
        if number >= ahead:
            kept -= chunks[-1 - _chunk(number - ahead, ranks, len(chunks))]
    return most


def _chunk(number: int, ranks: int, chunks: int) -> int:
    """Which chunk a pass runs: ``ranks`` micro-batches through each in turn."""
    return number // ranks % chunks
