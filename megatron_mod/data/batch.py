"""Rows of documents as the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    ``documents``: for each row the tokens of each document in it, in order; ``states``
    ``[B, S, H]``: the samples' hidden states, zero at padding, if they have any.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    roles: Tensor
    documents: tuple[tuple[int, ...], ...]
    states: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        """The batch with its tensors put through ``function``."""
        tensors = (self.input_ids, self.position_ids, self.labels, self.roles)
        states = None if self.states is None else function(self.states)
        return MicroBatch(*map(function, tensors), self.documents, states)

    def to(self, device: torch.device) -> MicroBatch:
        """As ``on_device`` of each tensor."""
        return self.map(lambda tensor: on_device(tensor, device))


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there, without waiting: a plain copy to a GPU begins when all its work is done."""
    if device.type == "cpu" or not tensor.is_cpu:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def label_places(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Row and column ``[N]`` of every label of a batch, row by row."""
    rows, columns = (batch.labels != IGNORE).nonzero(as_tuple=True)
    return rows, columns


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
    states = _empty_states(packs, length)
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
            if states is not None:
                states[number, first:last] = sample.states
            first = last
    return MicroBatch(input_ids, position_ids, labels, roles, documents, states)


def _empty_states(rows: Sequence[Row], length: int) -> Tensor | None:
    of_samples = (sample.states for row in rows for sample in row)
    some = next(of_samples, None)
    return None if some is None else some.new_zeros(len(rows), length, some.shape[1])


def blank_like(batch: MicroBatch) -> MicroBatch:
    """A micro-batch of padding only, for a rank that has run out of rows."""
    states = None if batch.states is None else torch.zeros_like(batch.states)
    return replace(blank(*batch.input_ids.shape), states=states)


def blank(rows: int, length: int) -> MicroBatch:
    """Rows of so many tokens of padding."""
    return MicroBatch(
        input_ids=torch.zeros(rows, length, dtype=torch.int64),
        position_ids=torch.arange(length).repeat(rows, 1),
        labels=torch.full((rows, length), IGNORE, dtype=torch.int64),
        roles=torch.full((rows, length), int(TokenRole.PADDING), dtype=torch.uint8),
        documents=((),) * rows,
    )


def equal_lengths(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The batches with their rows padded on the right to the longest of all."""
    length = max(batch.roles.shape[1] for batch in batches)
    return [_widen(batch, length) for batch in batches]


def _widen(batch: MicroBatch, length: int) -> MicroBatch:
    rows, missing = batch.roles.shape[0], length - batch.roles.shape[1]
    more = torch.arange(1, missing + 1).expand(rows, missing)
    pad = torch.nn.functional.pad
    return MicroBatch(
        input_ids=pad(batch.input_ids, (0, missing)),
        position_ids=torch.cat((batch.position_ids, batch.position_ids[:, -1:] + more), dim=1),
        labels=pad(batch.labels, (0, missing), value=IGNORE),
        roles=pad(batch.roles, (0, missing), value=int(TokenRole.PADDING)),
        documents=batch.documents,
        states=None if batch.states is None else pad(batch.states, (0, 0, 0, missing)),
    )
