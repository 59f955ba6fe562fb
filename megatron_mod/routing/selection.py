"""Which tokens of a batch are computed: gathering them, padding them by document, adding back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    ``lengths``: tokens of each document. ``slots`` is the place of each token in the flattened
    ``[D * L]`` (``None``: all documents are ``L`` long), ``positions`` its position in its
    document; int64 ``[N]``.
    """

    longest: int
    lengths: Sequence[int]
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
        shape = (len(self.lengths), self.longest, *stream.shape[1:])
        if self.slots is None:
            return stream.reshape(shape)
        flat = stream.new_full((len(self.lengths) * self.longest, *stream.shape[1:]), fill)
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
    ``others``: those of the rest; ``documents``: the documents that have any, int64 ``[D]``
    (``None``: all of the batch); ``mask``: ``[S, B]``, multiplies what is added (``None``: ones).
    """

    index: Tensor
    others: Tensor
    documents: Tensor | None
    segments: Segments
    mask: Tensor | None = None

    def take(self, grid: Tensor) -> Tensor:
        return grid.flatten(0, 1).index_select(0, self.index).unsqueeze(1)

    def put(self, stream: Tensor, shape: torch.Size) -> Tensor:
        """The stream in a grid ``[S, B, ...]`` of zeros; ``shape`` is ``(S, B)``."""
        zeros = stream.new_zeros(shape[0] * shape[1], *stream.shape[2:])
        return zeros.index_copy(0, self.index, stream.squeeze(1)).view(*shape, *stream.shape[2:])

    def rest(self) -> Selection:
        """The tokens that are not chosen, of which only ``take`` is known."""
        return replace(self, index=self.others, others=self.index, mask=None)

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
            rest = self.rest()
            flat = flat.index_add(0, rest.index, instead(rest).squeeze(1))
        return flat.view_as(grid)


def count_chosen(chosen: Tensor, document: Tensor, num_documents: int) -> Tensor:
    """Chosen tokens per document, int64 ``[num_documents]``, of two tensors of one shape."""
    counts = torch.zeros(num_documents, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add_(0, document.flatten(), chosen.flatten().long())


@dataclass(frozen=True)
class Grid:
    """All tokens ``[S, B]`` of a micro-batch, to choose from.

    ``table``: int64 ``[3, B * S]``, row by row, which is document by document: their places in the
    flattened ``[S * B]``, the documents they belong to, and their positions in these.
    ``are_rows``: that a row is a document.
    """

    table: Tensor
    num_documents: int
    are_rows: bool

    @classmethod
    def of(cls, document: Tensor, positions: Tensor, *, num_documents: int, are_rows: bool) -> Grid:
        """``document``, ascending along each row and from row to row, and ``positions`` of each
        token in its document: int64 ``[S, B]``."""
        places = torch.arange(document.numel(), device=document.device).view_as(document)
        table = torch.stack([each.t().flatten() for each in (places, document, positions)])
        return cls(table, num_documents, are_rows)

    def choose(self, chosen: Tensor) -> Choice:
        """All that follows from a choice, bool ``[S, B]``, before anyone is told its number."""
        by_row = chosen.t().flatten()
        if self.are_rows:
            counts = chosen.sum(0)
        else:
            counts = count_chosen(by_row, self.table[1], self.num_documents)
        return Choice(counts, self.table.index_select(1, chosen_first(by_row)))


@dataclass(frozen=True)
class Choice:
    """Chosen tokens of which the host does not know how many there are.

    ``counts``: of each document, int64 ``[D]``; ``table``: a ``Grid``'s with the chosen ones in
    front.
    """

    counts: Tensor
    table: Tensor

    def selection(
        self, counts: list[list[int]], *, rank: int = 0, mask: Tensor | None = None
    ) -> Selection:
        """The chosen tokens, without asking the device for anything.

        Context-parallel ranks hold parts of the same documents; the padded forms of all of them
        have the same shape, so that keys can be gathered.

        Args:
            counts: ``Choice.counts`` on the host, of each context-parallel rank.
            rank: this rank's place in them.
        """
        count = sum(counts[rank])
        places, owners, positions = self.table
        index, others = places[:count], places[count:]
        owners, positions = owners[:count], positions[:count]
        chosen = [number for number, each in enumerate(zip(*counts, strict=True)) if any(each)]
        lengths = [counts[rank][number] for number in chosen]
        longest = max(map(max, counts))
        slots = None
        if any(length != longest for length in lengths):
            padding, ahead = [0] * len(counts[rank]), 0  # before each document
            for number, length in zip(chosen, lengths, strict=True):
                padding[number] = ahead
                ahead += longest - length
            slots = torch.arange(len(owners), device=owners.device) + _on(owners, padding)[owners]
        documents = None if len(chosen) == len(counts[rank]) else _on(owners, chosen)
        segments = Segments(longest, lengths, slots, positions)
        return Selection(index, others, documents, segments, mask)


def chosen_first(flags: Tensor) -> Tensor:
    """Places of the true entries of bool ``[n]`` in order, and then of the others, int64 ``[n]``;
    unlike ``nonzero`` without waiting for their number."""
    places, chosen = torch.arange(len(flags), device=flags.device), flags.cumsum(0)
    slots = torch.where(flags, chosen - 1, places - chosen + chosen[-1])
    return torch.empty_like(places).scatter_(0, slots, places)


def _on(like: Tensor, numbers: list[int]) -> Tensor:
    """int64, on a tensor's device."""
    return torch.tensor(numbers, dtype=torch.int64).to(like.device, non_blocking=True)
