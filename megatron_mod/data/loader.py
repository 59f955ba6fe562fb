"""Which samples a step trains on, and their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mod.data.chat import IGNORE, Sample
from megatron_mod.routing.masks import TokenRole


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, padded on the right to a common length ``S``.

    ``input_ids``, ``position_ids`` int64 ``[B, S]``; ``labels`` int64 ``[B, S]``, the next
    token or ``IGNORE``; ``roles`` uint8 ``[B, S]`` of ``TokenRole``.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    roles: Tensor

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(*(getattr(self, f).to(device) for f in self.__dataclass_fields__))


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
    return MicroBatch(input_ids, position_ids, labels, roles)


class Loader:
    """Deals samples to steps, micro-batches and data-parallel ranks.

    The global batch of a step is a function of seed and step alone: every epoch is a
    permutation of its own, and batches run across epoch borders. Inside a global batch
    rows are sorted by length before they are cut into micro-batches (less padding), and
    rank ``r`` of ``n`` takes micro-batches ``r, r + n, ...``, so that their composition
    does not depend on ``n``.
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
    ) -> None:
        self.samples = samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.data_rank, self.data_ranks = data_rank, data_ranks
        self.multiple = multiple
        self._epoch: tuple[int, Tensor] | None = None

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.samples))
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = epoch, torch.randperm(len(self.samples), generator=generator)
        return int(self._epoch[1][offset])

    def step(self, number: int) -> StepBatch:
        """The batch of step ``number``, counted from 0."""
        return self._deal(self._rows(number))

    def sources(self, number: int) -> list[str]:
        """Where each sequence of a step's global batch comes from."""
        return [sample.source for sample in self._rows(number)]

    def _rows(self, number: int) -> list[Sample]:
        first = number * self.global_batch_size
        return [self.samples[self._index(first + i)] for i in range(self.global_batch_size)]

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
        while len(micro_batches) % self.data_ranks:
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
    )
