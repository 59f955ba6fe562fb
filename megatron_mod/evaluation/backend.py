"""A model that scores and continues texts, whatever runs it and on however many ranks."""

from __future__ import annotations

import abc
import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_mod.checkpoint.companions import read_json
from megatron_mod.config.evaluation import SELECTIONS
from megatron_mod.conversion.config_types import TOKENS, check_fields
from megatron_mod.evaluation.rows import Row, Score
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import Place

T = TypeVar("T")
GENERATION_CONFIG = "generation_config.json"
CAUSAL, TOP_K = SELECTIONS
NOT_FINITE = -1  # in a generated token's place: the logits were no numbers


@dataclass(frozen=True)
class Observation:
    """A row's score, and the logits that each router gave its units: ``[1]`` of a sequence,
    ``[len(ids)]`` of its tokens, ``[len(ids) * k]`` of the ``k`` experts of each."""

    score: Score
    logits: dict[Place, Tensor]


class Backend(abc.ABC):
    """Scores and continues texts on behalf of all ranks of a job.

    Every rank makes the same calls and gets all results: batches are dealt to the data-parallel
    ranks, and what they find is gathered.

    A subclass sets ``places``, those of the routers, and ``thresholds``, what they decide by.

    Routers that keep exactly so many of a text's tokens decide by the rule of ``selection``, which
    may be changed between calls: ``CAUSAL``, as generation has to, or ``TOP_K``, as training does.

    Args:
        tokenizer: the model's, fast.
        max_length: most tokens of a text; ``None``: as many as the model has positions.
        batch_size: texts run together.
        pooling: what a sequence's decision sees when a text is scored: its ``prompt`` (default),
            as in generation, or ``all`` of it. Generation always decides on the prompt. A window of
            a running text has no prompt but the token before it: all of it is seen unless
            ``prompt`` is asked for.
        routing: of the routers, ``None`` for a dense model.
        selection: ``CAUSAL`` (default) or ``TOP_K``, where ``routing`` knows both; else none.

    Raises:
        ValueError: a length the model does not have, a pooling where no sequence is routed, or a
            selection where there is none to choose.
    """

    places: Sequence[Place]
    thresholds: Sequence[float]

    def __init__(
        self,
        tokenizer,
        *,
        positions: int,
        max_length: int | None,
        batch_size: int,
        routing: RoutingConfig | None,
        pooling: str | None,
        selection: str | None = None,
        data_rank: int = 0,
        data_ranks: int = 1,
    ) -> None:
        if max_length is not None and not 2 <= max_length <= positions:
            raise ValueError(
                f"max_length = {max_length}: must be from 2 to the model's {positions} positions."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}: must be at least 1.")
        routed_by = routing and routing.scheme
        by_sequence = routed_by is not None and routed_by.per_sequence
        if pooling and not by_sequence:
            reason = f"with granularity {str(routed_by)!r} each token decides for itself"
            raise ValueError(
                f"pooling = {pooling!r}: {reason if routed_by else 'this model has no routers'}; "
                "leave it out."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length or positions
        self.batch_size = batch_size
        self.scheme, self.by_sequence = routed_by, by_sequence
        self.pooling = (pooling or "prompt") if by_sequence else None
        self.text_pooling = (pooling or "all") if by_sequence else None
        self.selection = _selection(selection, routing)
        self.stop_tokens = stop_tokens(tokenizer)
        self._data_rank, self._data_ranks = data_rank, data_ranks

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Each row's score, in order.

        Raises:
            ValueError: one is not finite.
        """
        rows = self._pooled(rows)
        batches = self._deal([len(row.ids) for row in rows])
        parts = [[rows[index] for index in batch] for batch in batches]
        found = self._score(self._shown(parts, "scoring"))
        return _finite(self._collect(batches, found, len(rows)))

    def windows(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Windows of a running text, as a decision is to see them."""
        return _whole(rows) if self.text_pooling == "all" else rows

    def observe(self, rows: Sequence[Row], *, thresholds: Sequence[float]) -> list[Observation]:
        """Each row's score and router logits, in order, with the routers at ``thresholds``, one
        for each; of exact routers the logits of the causal rule, which decides.

        Raises:
            ValueError: a score is not finite.
        """
        assert self.selection != TOP_K, "no threshold decides"
        rows = self._pooled(rows)
        batches = self._deal([len(row.ids) for row in rows])
        parts = [[rows[index] for index in batch] for batch in batches]
        with self._deciding_by(thresholds) as watched:
            scores = _finite(self._collect(batches, self._score(parts), len(rows)))
        mine: dict[int, dict[Place, Tensor]] = {}
        for place, found in watched.items():
            for part, batch, logits in zip(parts, batches, found, strict=True):
                lengths = [1 if self.by_sequence else len(row.ids) for row in part]
                each = len(logits) // sum(lengths)  # of a token's experts, one for each
                sizes = [each * length for length in lengths]
                for index, units in zip(batch, logits.cpu().split(sizes), strict=True):
                    mine.setdefault(index, {})[place] = units
        everybody: dict[int, dict[Place, Tensor]] = {}
        for one in _gather(mine):
            for index, logits in one.items():
                everybody.setdefault(index, {}).update(logits)
        return [
            Observation(score, {place: everybody[index][place] for place in self.places})
            for index, score in enumerate(scores)
        ]

    def generate(
        self, prompts: Sequence[Sequence[int]], *, until: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        """Each prompt's greedy continuation, up to an end token or one of the strings ``until``.

        Raises:
            ValueError: the logits were not finite, or a selection that needs the whole text.
        """
        if self.selection == TOP_K:
            raise ValueError(
                f"--selection {TOP_K}: a text that is being generated has no later tokens to "
                f"choose among; leave tasks that generate out, or give --selection {CAUSAL}."
            )
        batches = self._deal([len(prompt) for prompt in prompts])
        parts = [[prompts[index] for index in batch] for batch in batches]
        found = self._generate(parts, until=until, max_new_tokens=max_new_tokens)
        tokens = self._collect(batches, found, len(prompts))
        if any(NOT_FINITE in new for new in tokens):
            raise _not_finite(sum(NOT_FINITE in new for new in tokens), len(tokens))
        return [self._text(new, until) for new in tokens]

    def capacity(self) -> dict[Place, float]:
        """Share of the units (sequences or tokens) of all scored texts and prompts so far that
        each router kept, by the selection that is set; the same on every rank. Generated tokens
        are not counted."""
        counts = sum(_gather(self._counts())).t().tolist()
        return {
            place: kept / units if units else 1.0
            for place, (kept, units, _) in zip(self.places, counts, strict=True)
        }

    def agreement(self) -> float:
        """Share of all decisions by ``TOP_K`` so far, set now, that ``CAUSAL`` would have made
        alike about the same hidden states; the same on every rank."""
        assert self.selection == TOP_K
        _, units, agreed = sum(_gather(self._counts())).sum(1).tolist()
        return agreed / units

    def experts(self) -> dict[Place, Tensor]:
        """Of each router on experts how many tokens each of them computed, and how many were sent
        to it, ``[2, num_experts]``, in the last call that scored texts; the same on every rank.
        Nothing where others are routed."""
        found: dict[Place, Tensor] = {}
        for place, counts in (item for part in _gather(self._experts()) for item in part.items()):
            found[place] = found[place] + counts if place in found else counts
        return dict(sorted(found.items()))

    def _experts(self) -> dict[Place, Tensor]:
        """This rank's part of ``experts``."""
        return {}

    @abc.abstractmethod
    def _counts(self) -> Tensor:
        """Kept, counted and (by ``TOP_K``) agreed units ``[3, num_routed]`` of this rank by the
        selection that is set, such that all ranks' add up."""

    @abc.abstractmethod
    def _deciding_by(
        self, thresholds: Sequence[float]
    ) -> AbstractContextManager[dict[Place, list[Tensor]]]:
        """Lets the routers decide by these thresholds, one for each, in the block; by their
        own again after it. Yields, for each router that this rank holds, a list that each
        batch run in the block adds its units' logits to, row by row ``[num_units]``."""

    @abc.abstractmethod
    def _score(self, batches: Collection[Sequence[Row]]) -> list[list[Score]]:
        """The scores of this rank's batches; nothing on a rank that does not see them."""

    @abc.abstractmethod
    def _generate(
        self,
        batches: Sequence[Sequence[Sequence[int]]],
        *,
        until: Sequence[str],
        max_new_tokens: int,
    ) -> list[list[list[int]]]:
        """The new tokens of this rank's batches of prompts, at least up to their end, or up to
        ``NOT_FINITE``."""

    def is_finished(self, tokens: Sequence[int], until: Sequence[str]) -> bool:
        """Whether generated ``tokens`` hold an end token or, as text, a string of ``until``."""
        if self.stop_tokens.intersection(tokens) or NOT_FINITE in tokens:
            return True
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return any(stop in text for stop in until)

    def _text(self, tokens: Sequence[int], until: Sequence[str]) -> str:
        ends = [place for place, token in enumerate(tokens) if token in self.stop_tokens]
        text = self.tokenizer.decode(tokens[: min(ends, default=None)], skip_special_tokens=True)
        for stop in until:
            text = text.split(stop)[0]
        return text

    def _deal(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of this data-parallel rank's batches, the longest texts first."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        size = self.batch_size
        batches = [order[first : first + size] for first in range(0, len(order), size)]
        return batches[self._data_rank :: self._data_ranks]

    def _collect(self, batches: list[list[int]], found: list[list[T]], total: int) -> list[T]:
        """Everybody's results in order, from those of this rank's batches (or nothing)."""
        pairs = zip(batches, found, strict=bool(found))
        mine = {index: value for pair in pairs for index, value in zip(*pair, strict=True)}
        results = {index: value for part in _gather(mine) for index, value in part.items()}
        return [results[index] for index in range(total)]

    def _pooled(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows as a decision is to see them."""
        return _whole(rows) if self.pooling == "all" else rows

    def _shown(self, batches: Sequence[T], what: str) -> Collection[T]:
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        return tqdm(batches, desc=what, disable=not is_first)


def _selection(asked: str | None, routing: RoutingConfig | None) -> str | None:
    """By which rule exact routers decide.

    Raises:
        ValueError: asked for where there is one rule only.
    """
    if routing is not None and routing.causal is not None:
        return asked or CAUSAL
    if asked is not None:
        reason = "this model has no routers"
        if routing is not None:
            reason = f"these routers have one rule (router.selection = {routing.selection})"
        raise ValueError(f"--selection {asked}: {reason}; leave it out.")
    return None


def _whole(rows: Sequence[Row]) -> list[Row]:
    return [replace(row, context=len(row.ids)) for row in rows]


def _finite(scores: list[Score]) -> list[Score]:
    """The scores, the same on every rank, if all of them are numbers."""
    faults = sum(not math.isfinite(score.log_probability) for score in scores)
    if faults:
        raise _not_finite(faults, len(scores))
    return scores


def _not_finite(faults: int, total: int) -> ValueError:
    return ValueError(
        f"the model's logits are NaN or infinite for {faults} of {total} texts. Its weights are "
        "finite, so its activations overflow: run it in float32, or look at how it was trained or "
        "converted."
    )


def _gather(mine: T) -> list[T]:
    """Every rank's, in their order."""
    if not dist.is_initialized():
        return [mine]
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts


def stop_tokens(tokenizer) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's and those of its folder's generation settings."""
    found = {tokenizer.eos_token_id}
    folder = Path(tokenizer.name_or_path)
    if (folder / GENERATION_CONFIG).is_file():
        settings = read_json(folder, GENERATION_CONFIG)
        check_fields(settings, {"eos_token_id": TOKENS}, folder / GENERATION_CONFIG)
        more = settings.get("eos_token_id")
        found.update(more if isinstance(more, list) else [more])
    return frozenset(found - {None})
