"""Rows of documents as the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_mod.data.chat import IGNORE, Sample
from megatron_mod.routing.masks import TokenRole

Row = Sequence[Sample]  # documents that follow each other without a gap


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, padded on the right to a common length ``S``.

    ``input_ids`` int64 ``[B, S]``; ``position_ids`` int64 ``[B, S]``, from 0 in each document
    (padding goes on counting); ``labels`` int64 ``[B, S]``, the next token of the same document
    or ``IGNORE``; ``roles`` uint8 ``[B, S]`` of ``TokenRole``, document by document;
    ``documents``: for each row the tokens of each document in it, in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    roles: Tensor
    documents: tuple[tuple[int, ...], ...]

    def to(self, device: torch.device) -> MicroBatch:
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def collate(rows: Sequence[Sample | Row], *, multiple: int = 1, pad_id: int = 0) -> MicroBatch:
    """Pad rows on the right to the longest, rounded up to ``multiple`` tokens.

    A row is a document or a sequence of them.
    """
    packs = [[row] if isinstance(row, Sample) else list(row) for row in rows]
    documents = tuple(tuple(len(sample.ids) for sample in row) for row in packs)
    length = -(-max(map(sum, documents)) // multiple) * multiple
    shape = (len(packs), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    roles = torch.full(shape, int(TokenRole.PADDING), dtype=torch.uint8)
    position_ids = torch.arange(length).repeat(len(packs), 1)
    for number, row in enumerate(packs):
        first = 0
        for sample in row:
            last, prompt = first + len(sample.ids), first + sample.prompt_length
            ids = torch.tensor(sample.ids)
            input_ids[number, first:last] = ids
            labelled = torch.tensor(sample.labelled[1:], dtype=torch.bool)
            labels[number, first : last - 1] = torch.where(labelled, ids[1:], IGNORE)
            roles[number, first:prompt] = int(TokenRole.PROMPT)
            roles[number, prompt:last] = int(TokenRole.ANSWER)
            position_ids[number, first:] = torch.arange(length - first)
            first = last
    return MicroBatch(input_ids, position_ids, labels, roles, documents)


def blank_like(batch: MicroBatch) -> MicroBatch:
    """A micro-batch of padding only, for a rank that has run out of rows."""
    rows, length = batch.input_ids.shape
    return MicroBatch(
        input_ids=torch.zeros_like(batch.input_ids),
        position_ids=torch.arange(length).repeat(rows, 1),
        labels=torch.full_like(batch.labels, IGNORE),
        roles=torch.full_like(batch.roles, int(TokenRole.PADDING)),
        documents=((),) * rows,
    )
