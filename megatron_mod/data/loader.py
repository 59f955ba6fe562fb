"""Which samples a step trains on, and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mod.data.chat import IGNORE, Sample
from megatron_mod.routing.masks import TokenRole


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, padded on the right to a common length ``S``.

    ``input_ids``, ``position_ids`` int64 ``[B, S]``; ``labels`` int64 ``[B, S]``, the next
    token or ``IGNORE``; ``roles`` uint8 ``[B, S]`` of ``TokenRole``; ``documents``: for each row
    the lengths in tokens of the documents in it.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    roles: Tensor
    documents: tuple[tuple[int, ...], ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> MicroBatch:
        """The batch with its tensors put through ``function``."""
        tensors = (self.input_ids, self.position_ids, self.labels, self.roles)
        return MicroBatch(*map(function, tensors), self.documents)

    def to(self, device: torch.device) -> MicroBatch:
        return self.map(lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of one step, and the counts of the whole global batch."""

    micro_batches: list[MicroBatch]
    num_sequences: int
    num_tokens: int  # without padding
    num_labels: int


def collate(samples: Sequence[Sample], *, multiple: int = 1, pad_id: int = 0) -> MicroBatch:
    """Pad samples on the right to the longest, rounded up to ``multiple`` tokens."""
    longest = max(len(sample.ids) for sample in samples)
    length = -(-longest // multiple) * multiple
    shape = (len(samples), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    roles = torch.full(shape, int(TokenRole.PADDING), dtype=torch.uint8)
    for row, sample in enumerate(samples):
        count, prompt = len(sample.ids), sample.prompt_length
        ids = torch.tensor(sample.ids)
        input_ids[row, :count] = ids
        labelled = torch.tensor(sample.labelled[1:], dtype=torch.bool)
        labels[row, : count - 1] = torch.where(labelled, ids[1:], IGNORE)
        roles[row, :prompt] = int(TokenRole.PROMPT)
        roles[row, prompt:count] = int(TokenRole.ANSWER)
    position_ids = torch.arange(length).expand(shape).contiguous()
    documents = tuple((len(sample.ids),) for sample in samples)
    return MicroBatch(input_ids, position_ids, labels, roles, documents)


def equal_lengths(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The batches with their rows padded on the right to the longest of all."""
    length = max(batch.roles.shape[1] for batch in batches)
    return [_widen(batch, length) for batch in batches]


def _widen(batch: MicroBatch, length: int) -> MicroBatch:
    rows, missing = batch.roles.shape[0], length - batch.roles.shape[1]
    more = torch.arange(1, missing + 1).expand(rows, missing)
    pad = torch.nn.functional.pad
    return MicroBatch(
        pad(batch.input_ids, (0, missing)),
        torch.cat((batch.position_ids, batch.position_ids[:, -1:] + more), dim=1),
        pad(batch.labels, (0, missing), value=IGNORE),
        pad(batch.roles, (0, missing), value=int(TokenRole.PADDING)),
        batch.documents,
    )


class Loader:
    """Deals samples to steps, micro-batches and data-parallel ranks.

    The global batch of a step is a function of seed and step alone: every epoch is a
    permutation of its own, and batches run across epoch borders. Inside a global batch
    rows are sorted by length before they are cut into micro-batches (less padding), and
    rank ``r`` of ``n`` takes micro-batches ``r, r + n, ...``, so that their composition
    does not depend on ``n``. ``group``: a rank's micro-batches are filled up with blank ones to
    a multiple of it (a virtual pipeline asks for that).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        multiple: int = 1,
        group: int = 1,
    ) -> None:
        self.samples = samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.data_rank, self.data_ranks = data_rank, data_ranks
        self.multiple, self.group = multiple, group
        self._epoch: tuple[int, Tensor] | None = None

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.samples))
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = epoch, torch.randperm(len(self.samples), generator=generator)
        return int(self._epoch[1][offset])

    def step(self, number: int) -> StepBatch:
        """The batch of step ``number``, counted from 0."""
        first = number * self.global_batch_size
        rows = [self.samples[self._index(first + i)] for i in range(self.global_batch_size)]
        return self._deal(rows)

    def passes(self) -> Iterator[StepBatch]:
        """All samples once, in order, a global batch at a time; the last is filled up with
        rows whose labels and tokens do not count."""
        for first in range(0, len(self.samples), self.global_batch_size):
            yield self._deal(self.samples[first : first + self.global_batch_size])

    def _deal(self, rows: Sequence[Sample]) -> StepBatch:
        ordered = sorted(rows, key=lambda sample: len(sample.ids))
        size = self.micro_batch_size
        micro_batches = [
            collate(ordered[i : i + size], multiple=self.multiple)
            for i in range(0, len(ordered), size)
        ]
        while len(micro_batches) % (self.data_ranks * self.group):
            micro_batches.append(_blank_like(micro_batches[0]))
        return StepBatch(
            micro_batches=micro_batches[self.data_rank :: self.data_ranks],
            num_sequences=len(rows),
            num_tokens=sum(len(sample.ids) for sample in rows),
            num_labels=sum(sample.num_labels for sample in rows),
        )


def _blank_like(batch: MicroBatch) -> MicroBatch:
    """A micro-batch of padding only, for a rank that has run out of rows."""
    return MicroBatch(
        batch.input_ids,
        batch.position_ids,
        torch.full_like(batch.labels, IGNORE),
        torch.full_like(batch.roles, int(TokenRole.PADDING)),
        ((),) * len(batch.documents),
    )
