"""Which samples a step trains on, and how ranks and micro-batches share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_mod.data.batch import MicroBatch, blank_like, collate
from megatron_mod.data.chat import Sample
from megatron_mod.data.order import Order
from megatron_mod.data.packing import bucketed, packed


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of one step, and the counts of the whole global batch.

    ``num_sequences`` counts documents, packed or not; ``num_tokens`` leaves padding out;
    ``num_positions`` is what the model is given, padding included.
    """

    micro_batches: list[MicroBatch]
    num_sequences: int
    num_tokens: int
    num_labels: int
    num_positions: int

    @property
    def padding(self) -> float:
        """Share of the positions that hold no token."""
        return 1 - self.num_tokens / self.num_positions


class Loader:
    """Deals samples to steps, micro-batches and data-parallel ranks.

    The global batch of a step is a function of seed and step alone (``Order``), and batches run
    across epoch borders. It is cut into rows and micro-batches as a whole, whose composition thus
    does not depend on the number of ranks ``n``. They are dealt in rounds of ``n``, there and back,
    so that the ranks' shares of short and long rows are alike; a rank begins and ends with short
    ones, for which the stages of a pipeline wait.

    Args:
        samples: what is trained on.
        global_batch_size: documents a step.
        micro_batch_size: rows a forward pass.
        multiple: rows are as long as a multiple of this, for ranks that share the sequence.
        row_length: pack documents into rows of at most this many tokens; unset: one document a
            row, rows of like length together.
        group: a rank's micro-batches are filled up with blank ones to a multiple of this, which a
            virtual pipeline asks for.
        parts: number of samples and weight of each file; unset: all once an epoch.
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
        row_length: int | None = None,
        parts: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        self.samples = samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.data_rank, self.data_ranks = data_rank, data_ranks
        self.multiple, self.group = multiple, group
        self.row_length = row_length
        self.order = Order(parts or [(len(samples), 1.0)], seed=seed)

    def step(self, number: int) -> StepBatch:
        """The batch of step ``number``, counted from 0."""
        return self._deal(self._rows(number))

    def until(self, numbers: Iterable[int], *, tokens: int = 0, labels: int = 0) -> list[StepBatch]:
        """The batches of some steps, one after the other, until together they have so many tokens
        and labelled ones."""
        batches: list[StepBatch] = []
        for number in numbers:
            batches.append(self.step(number))
            has_tokens = sum(batch.num_tokens for batch in batches) >= tokens
            if has_tokens and sum(batch.num_labels for batch in batches) >= labels:
                break
        return batches

    def sources(self, number: int) -> list[str]:
        """Where each sequence of a step's global batch comes from."""
        return [sample.source for sample in self._rows(number)]

    def _rows(self, number: int) -> list[Sample]:
        first = number * self.global_batch_size
        return [self.samples[self.order[first + i]] for i in range(self.global_batch_size)]

    def passes(self) -> Iterator[StepBatch]:
        """All samples once, in order, a global batch at a time."""
        for first in range(0, len(self.samples), self.global_batch_size):
            last = min(first + self.global_batch_size, len(self.samples))
            yield self._deal([self.samples[i] for i in range(first, last)])

    def _deal(self, documents: Sequence[Sample]) -> StepBatch:
        """Cut into micro-batches; ranks that run out get rows of padding, which do not count."""
        size = self.micro_batch_size
        if self.row_length is None:
            rows = bucketed(documents)
        else:
            rows = packed(documents, length=self.row_length, num_rows_multiple=size)
        micro_batches = [
            collate(rows[i : i + size], multiple=self.multiple) for i in range(0, len(rows), size)
        ]
        while len(micro_batches) % (self.data_ranks * self.group):
            micro_batches.append(blank_like(micro_batches[0]))
        return StepBatch(
            micro_batches=self._share(micro_batches),
            num_sequences=len(documents),
            num_tokens=sum(len(sample.ids) for sample in documents),
            num_labels=sum(sample.num_labels for sample in documents),
            num_positions=sum(batch.input_ids.numel() for batch in micro_batches),
        )

    def _share(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """This rank's, of each round one; rounds go by length, and each runs against the last."""
        ranks = self.data_ranks
        there, back = self.data_rank, ranks - 1 - self.data_rank
        rounds = range(len(micro_batches) // ranks)
        rising, falling = rounds[::2], rounds[1::2][::-1]
        return [
            *(micro_batches[number * ranks + there] for number in rising),
            *(micro_batches[number * ranks + back] for number in falling),
        ]
