"""The documents of a global batch as rows with little padding."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_mod.data.chat import Sample


def bucketed(documents: Sequence[Sample]) -> list[list[Sample]]:
    """One document a row, by length, so that rows cut off in order pad little."""
    return [[document] for document in sorted(documents, key=_length)]


def packed(
    documents: Sequence[Sample], *, length: int, num_rows_multiple: int
) -> list[list[Sample]]:
    """Documents packed into as few rows of at most ``length`` tokens as first-fit-decreasing
    finds, rounded up to ``num_rows_multiple`` where there are enough documents.

    The rows are then made even, so that none is padded to another one's length and no rank
    waits for another: longest document first, each to the shortest row. Where that overfills a
    row, the first packing stays.
    """
    longest_first = sorted(documents, key=_length, reverse=True)
    rows = _first_fit(longest_first, length)
    wanted = -(-len(rows) // num_rows_multiple) * num_rows_multiple
    even = _evenly(longest_first, min(wanted, len(documents)))
    if max(map(_tokens, even)) <= length:
        rows = even
    return sorted(rows, key=_tokens)


def _first_fit(documents: Sequence[Sample], length: int) -> list[list[Sample]]:
    rows: list[list[Sample]] = []
    room: list[int] = []
    for document in documents:
        size = _length(document)
        number = next((n for n, left in enumerate(room) if size <= left), len(rows))
        if number == len(rows):
            rows.append([])
            room.append(length)
        rows[number].append(document)
        room[number] -= size
    return rows


def _evenly(documents: Sequence[Sample], count: int) -> list[list[Sample]]:
    rows: list[list[Sample]] = [[] for _ in range(count)]
    tokens = [0] * count
    for document in documents:
        number = tokens.index(min(tokens))
        rows[number].append(document)
        tokens[number] += _length(document)
    return rows


def _length(document: Sample) -> int:
    return len(document.ids)


def _tokens(row: Sequence[Sample]) -> int:
    return sum(map(_length, row))
