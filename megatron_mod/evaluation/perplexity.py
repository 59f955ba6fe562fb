"""Perplexity of conversations and texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mod.data.dataset import load_samples
from megatron_mod.data.sources import SUFFIXES
from megatron_mod.evaluation.backend import Backend
from megatron_mod.evaluation.rows import Row

LARGEST = 707.0  # nats a token: exp of it is the largest number, nearly


@dataclass(frozen=True)
class Quality:
    """``perplexity`` over ``tokens`` labelled tokens; ``capacity``: share of the samples, or of
    their tokens, that kept each routed layer (empty for a dense model)."""

    perplexity: float
    tokens: int
    capacity: list[float]


def perplexity(backend: Backend, rows: Sequence[Row]) -> Quality:
    """Perplexity of the rows' labels, and the capacity of all the backend has run so far.

    Raises:
        ValueError: it is larger than a number can be, or a score is not finite.
    """
    nats = math.fsum(-score.log_probability for score in backend.score(rows))
    tokens = sum(row.num_labels for row in rows)
    if nats / tokens > LARGEST:
        raise ValueError(
            f"the perplexity is above 1e307 (a loss of {nats / tokens:.0f} nats a token): the "
            "weights are not those of a trained model, or not of this tokenizer."
        )
    return Quality(math.exp(nats / tokens), tokens, list(backend.capacity().values()))


def holds_conversations(path: str | Path) -> bool:
    """Whether a file holds records, as in training, rather than a text."""
    return Path(path).suffix in SUFFIXES


def read_rows(path: str | Path, tokenizer, *, max_length: int) -> list[Row]:
    """What to score in a file: the answers of conversations (a data file), or all of a text.

    A text is cut into windows of ``max_length`` tokens, each after the last token before it
    (the first after the beginning- or end-of-text token), which is all of its context.

    Raises:
        ValueError: no such file, or nothing in it to score.
    """
    path = Path(path)
    if holds_conversations(path):
        samples = load_samples(path, tokenizer, max_length=max_length)
        return [Row.labelled(sample) for sample in samples]
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give {', '.join(SUFFIXES)} or a text.")
    try:
        ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}.") from error
    if not ids:
        raise ValueError(f"{path}: no text in it.")
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = [first, *ids]
    starts = range(1, len(ids), max_length)
    return [Row.continuation([ids[at - 1]], ids[at : at + max_length]) for at in starts]
