"""Rows of a conversion table; each reads both ways.

A row names one Megatron parameter and the Hugging Face tensors it is made of.
Tensors are whole (not sharded), as a distributed checkpoint describes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Mapping(Protocol):
    """One row of a family's table."""

    megatron: str

    @property
    def hf(self) -> tuple[str, ...]:
        """The Hugging Face tensors this row consumes or produces, in order."""
        ...

    def to_megatron(self, *hf: Tensor) -> Tensor: ...

    def to_hf(self, megatron: Tensor) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Direct:
    """The same tensor under another name."""

    megatron: str
    hf_name: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.hf_name,)

    def to_megatron(self, *hf: Tensor) -> Tensor:
        return hf[0]

    def to_hf(self, megatron: Tensor) -> tuple[Tensor, ...]:
        return (megatron,)


@dataclass(frozen=True)
class QKV:
    """Separate query, key and value projections, interleaved by query group in Megatron.

    Megatron's ``[(heads + 2 * groups) * D, H]`` holds, for each group, its queries,
    then its key, then its value.
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

    def to_megatron(self, *hf: Tensor) -> Tensor:
        groups = [t.unflatten(0, (self.num_query_groups, -1)) for t in hf]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def to_hf(self, megatron: Tensor) -> tuple[Tensor, ...]:
        groups = megatron.unflatten(0, (self.num_query_groups, -1))
        head_dim = groups.shape[1] // (self.queries_per_group + 2)
        parts = groups.split((self.queries_per_group * head_dim, head_dim, head_dim), dim=1)
        return tuple(part.flatten(0, 1).contiguous() for part in parts)


@dataclass(frozen=True)
class GatedMLP:
    """Gate and up projections, stacked in Megatron: ``[2 * ffn, H]``, gate first."""

    megatron: str
    gate: str
    up: str

    @property
    def hf(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def to_megatron(self, *hf: Tensor) -> Tensor:
        return torch.cat(hf, dim=0)

    def to_hf(self, megatron: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.contiguous() for part in megatron.chunk(2, dim=0))
