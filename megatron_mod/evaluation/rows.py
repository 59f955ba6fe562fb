"""Texts to score: what is run, what a sequence's decision may see of it, and what is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megatron_mod.data.batch import MicroBatch
from megatron_mod.data.chat import IGNORE, Sample
from megatron_mod.routing.masks import TokenRole

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A text to run a model on.

    ``ids``: its tokens; ``context``: how many of them, from the left, are the prompt;
    ``labels``: for each token the one to be predicted after it, or ``IGNORE``.
    """

    ids: Sequence[int]
    context: int
    labels: Sequence[int]

    @classmethod
    def prompt(cls, ids: Sequence[int], *, context: int | None = None) -> Row:
        """A text nothing is asked about; all of it is the prompt, or its first ``context``."""
        return cls(ids, len(ids) if context is None else context, [IGNORE] * len(ids))

    @classmethod
    def continuation(cls, context: Sequence[int], continuation: Sequence[int]) -> Row:
        """Every token of ``continuation`` given all before it; the last one is never an input."""
        ids = [*context, *continuation[:-1]]
        unasked = len(ids) - len(continuation)
        return cls(ids, len(context), [IGNORE] * unasked + list(continuation))

    @classmethod
    def labelled(cls, sample: Sample) -> Row:
        """The labelled tokens of a sample, its prompt being all before the first of them."""
        after = zip(sample.ids[1:], sample.labelled[1:], strict=True)
        labels = [token if labelled else IGNORE for token, labelled in after]
        return cls(sample.ids, sample.prompt_length, [*labels, IGNORE])

    @property
    def num_labels(self) -> int:
        return len(self.labels) - list(self.labels).count(IGNORE)


def level_batches(texts: Sequence[Sequence[int]], *, size: int) -> list[Tensor]:
    """The tokens of the longer half of the texts, ``size`` at a time ``[B, S]``, all cut to the
    shortest of them, so that none are padding and times are of one thing; what fills no batch is
    left out, if others are full.
    """
    longer = sorted(texts, key=len)[len(texts) // 2 :]
    length = len(longer[0])
    full = max(len(longer) // size, 1)
    batches = [longer[-(number + 1) * size :][:size] for number in range(full)]
    return [torch.tensor([ids[:length] for ids in batch]) for batch in batches]


def evenly(rows: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the rows, from all over."""
    count = min(count, len(rows))
    return [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


@dataclass(frozen=True)
class Score:
    """Nats of a row's labels together, and whether each is the likeliest token in its place."""

    log_probability: float
    is_greedy: bool


def collate_rows(rows: Sequence[Row]) -> MicroBatch:
    """Rows as a batch, padded on the right to the longest."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    roles = torch.full(shape, int(TokenRole.PADDING), dtype=torch.uint8)
    for index, row in enumerate(rows):
        length = len(row.ids)
        input_ids[index, :length] = torch.tensor(row.ids)
        labels[index, :length] = torch.tensor(row.labels)
        roles[index, : row.context] = int(TokenRole.PROMPT)
        roles[index, row.context : length] = int(TokenRole.ANSWER)
    position_ids = torch.arange(shape[1]).expand(shape).contiguous()
    documents = tuple((len(row.ids),) for row in rows)
    return MicroBatch(input_ids, position_ids, labels, roles, documents)


def label_scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of each label ``[N]``, and whether another token is likelier, of logits
    ``[N, vocab]``."""
    chosen = logits.float().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    return chosen, logits.argmax(-1) != labels


def scores(nats: Tensor, wrong: Tensor, rows: Tensor, batch: MicroBatch) -> list[Score]:
    """Each row's score, from those of its labels; ``rows`` are the labels' (``label_places``)."""
    sums = torch.zeros(2, len(batch.labels), dtype=torch.float64, device=nats.device)
    sums.index_add_(1, rows, torch.stack((nats.double(), wrong.double())))
    return [Score(nats, wrong == 0) for nats, wrong in sums.t().tolist()]
