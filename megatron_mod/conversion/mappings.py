"""Rows of a conversion table; each reads both ways.

A row says which runs of rows (slices of dim 0) of which Hugging Face tensors make up one
Megatron parameter, in order. Whole tensors in either direction, and the slice that one
tensor-parallel rank needs, all follow from that one list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class RowRange(NamedTuple):
    """Rows ``start .. stop - 1`` of a Hugging Face tensor."""

    name: str
    start: int
    stop: int


class Part(NamedTuple):
    """Rows ``start .. stop - 1`` of one expert's in a tensor ``[experts, rows, columns]``, or,
    without an expert, of a tensor ``[rows, columns]``."""

    name: str
    expert: int | None
    start: int
    stop: int


class Mapping(Protocol):
    """One row of a family's table."""

    @property
    def megatron(self) -> str:
        """The Megatron parameter, by its key in a distributed checkpoint."""
        ...

    @property
    def hf(self) -> tuple[str, ...]:
        """The Hugging Face tensors this row consumes or produces."""
        ...

    def runs(self, rows: int) -> list[RowRange]:
        """What the parameter's ``rows`` rows are made of, from the first to the last."""
        ...


@dataclass(frozen=True)
class Direct:
    """The same tensor under another name."""

    megatron: str
    hf_name: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.hf_name,)

    def runs(self, rows: int) -> list[RowRange]:
        return [RowRange(self.hf_name, 0, rows)]


@dataclass(frozen=True)
class QKV:
    """Separate query, key and value projections, interleaved by query group in Megatron.

    Megatron's ``[(heads + 2 * groups) * D, ...]`` holds, for each group, its queries,
    then its key, then its value; weights and biases alike.
    """

    megatron: str
    query: str
    key: str
    value: str
    num_query_groups: int
    queries_per_group: int

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def runs(self, rows: int) -> list[RowRange]:
        head_dim = rows // (self.num_query_groups * (self.queries_per_group + 2))
        found = []
        for group in range(self.num_query_groups):
            for name, heads in zip(self.hf, (self.queries_per_group, 1, 1), strict=True):
                size = heads * head_dim
                found.append(RowRange(name, group * size, (group + 1) * size))
        return found


@dataclass(frozen=True)
class GatedMLP:
    """Gate and up projections, stacked in Megatron: ``[2 * ffn, H]``, gate first."""

    megatron: str
    gate: str
    up: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def runs(self, rows: int) -> list[RowRange]:
        return [RowRange(name, 0, rows // 2) for name in self.hf]


def to_megatron(
    row: Mapping, read: Callable[[str, int, int], Tensor], rows: int, start: int, stop: int
) -> Tensor:
    """Rows ``start .. stop - 1`` of the Megatron parameter of ``rows`` rows.

    ``read(name, start, stop)`` gives rows of a Hugging Face tensor; only needed ones are asked for.
    """
    parts, position = [], 0
    for run in row.runs(rows):
        size = run.stop - run.start
        first, last = max(start - position, 0), min(stop - position, size)
        if first < last:
            parts.append(read(run.name, run.start + first, run.start + last))
        position += size
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def to_hf(row: Mapping, megatron: Tensor) -> dict[str, Tensor]:
    """The Hugging Face tensors of a whole Megatron parameter."""
    runs = row.runs(len(megatron))
    parts = megatron.split([run.stop - run.start for run in runs])
    found: dict[str, list[Tensor]] = {name: [] for name in row.hf}
    for run, part in zip(runs, parts, strict=True):
        found[run.name].append(part)
    return {name: torch.cat(p) if len(p) > 1 else p[0] for name, p in found.items()}
