"""Which tokens of a batch are computed: gathering them, padding them by document, adding back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias, Union

import torch
from torch import Tensor

# What stands in for the update of the tokens that a choice takes, in the form that it takes them.
StandInOf: TypeAlias = Callable[[Union["Everything", "Selection"]], Tensor]


@dataclass(frozen=True)
class Rows:
    """A grid of tokens ``[S, B, ...]`` whose rows are documents: padding it is a transposition.

    ``positions``: of each token in its document, int64 ``[B, S]``, ascending in every row.
    """

    positions: Tensor

    def pad(self, grid: Tensor) -> Tensor:
        return grid.transpose(0, 1)

    def unpad(self, padded: Tensor) -> Tensor:
        return padded.transpose(0, 1)

    def pad_positions(self, fill: int) -> Tensor:
        return self.positions


@dataclass(frozen=True)
class Segments:
    """A stream of tokens ``[N, 1, ...]``, document after document, and its form padded to the
    longest document, ``[D, L, ...]``.

    ``slots`` is the place of each token in the flattened ``[D * L]`` (``None``: all documents are
    ``L`` long), ``positions`` its position in its document; int64 ``[N]``. ``lengths``: tokens of
    each document, int64 ``[D]``.
    """

    num_documents: int
    longest: int
    lengths: Tensor
    slots: Tensor | None
    positions: Tensor

    def pad(self, stream: Tensor) -> Tensor:
        """``[N, 1, ...]`` to ``[D, L, ...]``, zeros where a document has ended."""
        return self._spread(stream.squeeze(1), 0)

    def unpad(self, padded: Tensor) -> Tensor:
        stream = padded.flatten(0, 1)
        return (stream if self.slots is None else stream[self.slots]).unsqueeze(1)

    def pad_positions(self, fill: int) -> Tensor:
        return self._spread(self.positions, fill)

    def places(self, length: int, documents: Tensor | None) -> Tensor:
        """Of each token its place in the flattened ``[D, length]`` of all tokens of all documents,
        of which ``documents`` are here (``None``: all); int64 ``[N]``."""
        slots = self.slots
        if slots is None:
            slots = torch.arange(len(self.positions), device=self.positions.device)
        number = slots // self.longest
        return (number if documents is None else documents[number]) * length + self.positions

    def _spread(self, stream: Tensor, fill: int) -> Tensor:
        shape = (self.num_documents, self.longest, *stream.shape[1:])
        if self.slots is None:
            return stream.reshape(shape)
        flat = stream.new_full((self.num_documents * self.longest, *stream.shape[1:]), fill)
        return flat.index_copy(0, self.slots, stream).view(shape)


@dataclass(frozen=True)
class Everything:
    """No token left out; ``mask`` ``[S, B]`` multiplies what is added (``None``: ones)."""

    mask: Tensor | None = None

    def take(self, grid: Tensor) -> Tensor:
        return grid

    def add(self, grid: Tensor, update: Tensor, instead: StandInOf | None = None) -> Tensor:
        """``grid + mask * update``, and ``(1 - mask) * instead`` of all tokens, all
        ``[S, B, H]``."""
        if self.mask is None:
            return grid + update
        mask = self.mask.to(update.dtype)[..., None]
        if instead is None:
            return grid + update * mask
        other = instead(self)
        return grid + other + (update - other) * mask


@dataclass(frozen=True)
class Selection:
    """The chosen tokens of a grid ``[S, B, ...]`` as a stream ``[N, 1, ...]``.

    ``index``: their places in the flattened ``[S * B]``, ordered by document, then position;
    ``documents``: the documents that have any, among those of the batch, int64 ``[D]``;
    ``mask``: ``[S, B]``, multiplies what is added (``None``: ones).
    """

    index: Tensor
    documents: Tensor
    segments: Segments
    mask: Tensor | None = None

    def take(self, grid: Tensor) -> Tensor:
        return grid.flatten(0, 1).index_select(0, self.index).unsqueeze(1)

    def put(self, stream: Tensor, shape: torch.Size) -> Tensor:
        """The stream in a grid ``[S, B, ...]`` of zeros; ``shape`` is ``(S, B)``."""
        zeros = stream.new_zeros(shape[0] * shape[1], *stream.shape[2:])
        return zeros.index_copy(0, self.index, stream.squeeze(1)).view(*shape, *stream.shape[2:])

    def rest(self, count: int) -> Selection:
        """The tokens that are not chosen of a grid of ``count``, of which only ``take`` is
        known."""
        chosen = torch.zeros(count, dtype=torch.bool, device=self.index.device)
        chosen.index_fill_(0, self.index, True)
        return replace(self, index=_indices(~chosen, count - len(self.index)), mask=None)

    def add(self, grid: Tensor, update: Tensor, instead: StandInOf | None = None) -> Tensor:
        """``grid`` ``[S, B, H]`` with ``mask * update`` and ``(1 - mask) * instead`` added at the
        chosen tokens, and ``instead`` at the others."""
        flat = grid.flatten(0, 1)
        if self.mask is not None:
            mask = self.take(self.mask).to(update.dtype)[..., None]
            if instead is None:
                update = update * mask
            else:
                other = instead(self)
                update = other + (update - other) * mask
        flat = flat.index_add(0, self.index, update.squeeze(1))
        if instead is not None:
            rest = self.rest(len(flat))
            flat = flat.index_add(0, rest.index, instead(rest).squeeze(1))
        return flat.view_as(grid)


def count_chosen(chosen: Tensor, document: Tensor, num_documents: int) -> Tensor:
    """Chosen tokens per document, int64 ``[num_documents]``, of two ``[S, B]`` tensors."""
    counts = torch.zeros(num_documents, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add_(0, document.flatten(), chosen.flatten().long())


def select(
    chosen: Tensor,
    document: Tensor,
    positions: Tensor,
    counts: Tensor,
    host_counts: list[list[int]],
    *,
    rank: int = 0,
    mask: Tensor | None = None,
) -> Selection:
    """Turn the choice of tokens into a ``Selection``, without asking the device for anything.

    Context-parallel ranks hold parts of the same documents; the padded forms of all of them
    have the same shape, so that keys can be gathered.

    Args:
        chosen: bool ``[S, B]``.
        document: of each token, int64 ``[S, B]``, ascending along each row and from row to row.
        positions: of each token in its document, int64 ``[S, B]``.
        counts: chosen tokens per document on each context-parallel rank, ``[ranks, documents]``.
        host_counts: the same numbers on the host, which shapes need.
        rank: this rank's row of ``counts``.
    """
    rows, columns = chosen.shape[1], chosen.shape[0]
    num_chosen = sum(host_counts[rank])
    totals = [sum(per_rank) for per_rank in zip(*host_counts, strict=True)]
    num_documents = sum(total > 0 for total in totals)
    longest = max(max(per_rank) for per_rank in host_counts)
    by_row = _indices(chosen.t().flatten(), num_chosen)
    row, column = by_row // columns, by_row % columns
    documents = _indices(counts.sum(0) > 0, num_documents)
    even = all(n == longest for n, total in zip(host_counts[rank], totals, strict=True) if total)
    slots = None
    if not even:
        of_token = document.t().flatten()[by_row]
        dense_number = (counts.sum(0) > 0).cumsum(0) - 1
        first = counts[rank].cumsum(0) - counts[rank]
        within = torch.arange(num_chosen, device=chosen.device) - first[of_token]
        slots = dense_number[of_token] * longest + within
    segments = Segments(
        num_documents, longest, counts[rank][documents], slots, positions.t().flatten()[by_row]
    )
    return Selection(column * rows + row, documents, segments, mask)


def _indices(flags: Tensor, count: int) -> Tensor:
    """Where the ``count`` true entries of bool ``[n]`` are: ``nonzero`` of a size already known."""
    places = torch.where(flags, flags.cumsum(0) - 1, count)
    out = torch.zeros(count + 1, dtype=torch.int64, device=flags.device)
    out.scatter_(0, places, torch.arange(len(flags), device=flags.device))
    return out[:count]
