"""Scoring and generation on a Hugging Face model, dense or an export of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from megatron_mod.data.batch import label_places
from megatron_mod.evaluation.backend import NOT_FINITE, Backend
from megatron_mod.evaluation.known_prefix import KnownPrefix, WatchedBorders
from megatron_mod.evaluation.rows import (
    Row,
    Score,
    collate_rows,
    label_scores,
    scores,
)
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.masks import TokenRole, valid_tokens
from megatron_mod.routing.scheme import EXPERT, Place


class HuggingFaceBackend(Backend):
    """A backend on a whole Hugging Face model; see ``Backend``."""

    def __init__(
        self,
        model,
        tokenizer,
        *,
        max_length: int | None = None,
        batch_size: int = 1,
        pooling: str | None = None,
        selection: str | None = None,
        data_rank: int = 0,
        data_ranks: int = 1,
    ) -> None:
        routing = getattr(model.config, "routing", None)
        settings = RoutingConfig.from_dict({"capacity": (), **routing}) if routing else None
        super().__init__(
            tokenizer,
            positions=model.config.max_position_embeddings,
            max_length=max_length,
            batch_size=batch_size,
            routing=settings,
            pooling=pooling,
            selection=selection,
            data_rank=data_rank,
            data_ranks=data_ranks,
        )
        self.model = model.eval()
        self.places = settings.places if settings else ()
        self._decides = bool(routing and model.config.places)  # gates with no-ops by no threshold
        self.thresholds = tuple(model.config.thresholds().values()) if routing else ()
        self._of_experts = any(place.target == EXPERT for place in self.places)
        self._prefix = KnownPrefix(model, self._beginnings()) if self._decides else None
        self._borders: WatchedBorders | None = None
        self._counted: Counter[tuple[str | None, str, Place]] = Counter()
        self._computed: dict[Place, Tensor] = {}

    def _beginnings(self) -> list[int]:
        """Layers at which a call may begin: what experts compute is told by a call alone, so that
        all of them have to run."""
        layers = sorted({place.layer for place in self.places})
        return layers[:1] if self._of_experts else layers

    def _experts(self) -> dict[Place, Tensor]:
        return self._computed

    def _counts(self) -> Tensor:
        return torch.tensor(
            [
                [self._counted[self.selection, name, place] for place in self.places]
                for name in ("kept", "units", "agreed")
            ]
        )

    @contextmanager
    def _deciding_by(self, thresholds: Sequence[float]) -> Iterator[dict[Place, list[Tensor]]]:
        self._borders = WatchedBorders(self.places, thresholds)
        if self._decides:
            self.model.set_thresholds(list(thresholds))
        try:
            yield self._borders.watched
        finally:
            self._borders = None
            if self._decides:
                self.model.set_thresholds(list(self.thresholds))

    @torch.no_grad()
    def _score(self, batches: Collection[Sequence[Row]]) -> list[list[Score]]:
        self._take_rule()
        found = []
        self._computed = {}
        for rows in batches:
            batch = collate_rows(rows).to(self.model.device)
            extra = {}
            if self.pooling:
                extra["routing_mask"] = batch.roles == TokenRole.PROMPT
            run = self.model
            if self._borders and self._prefix:  # the same texts will come again
                run, extra["borders"] = self._prefix, self._borders
            places = label_places(batch)
            first = int(places[1].min()) if len(places[1]) else 0
            output = run(
                batch.input_ids,
                attention_mask=valid_tokens(batch.roles).long(),
                logits_to_keep=batch.input_ids.shape[1] - first,
                use_cache=False,
                **extra,
            )
            self._count()
            logits = output.logits[places[0], places[1] - first]
            nats, wrong = label_scores(logits, batch.labels[places])
            found.append(scores(nats, wrong, places[0], batch))
        return found

    def _generate(
        self,
        batches: Sequence[Sequence[Sequence[int]]],
        *,
        until: Sequence[str],
        max_new_tokens: int,
    ) -> list[list[list[int]]]:
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.stop_tokens),
            pad_token_id=self.tokenizer.eos_token_id,
        )
        self._take_rule()
        # Plain greedy search: what the folder's settings add would change it.
        self.model.generation_config = settings
        found = []
        for prompts in self._shown(batches, "generating"):
            ids, mask = _pad_left(prompts, self.tokenizer.eos_token_id, self.model.device)
            length = ids.shape[1]
            stop = _Stop(lambda row: self.is_finished(row, until), length, self._count)
            watch = _WatchedLogits(len(prompts))
            output = self.model.generate(
                ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=[watch],
                stopping_criteria=[stop],
            )
            rows = zip(output[:, length:].tolist(), watch.broken.tolist(), strict=True)
            found.append([[NOT_FINITE] if broken else row for row, broken in rows])
        return found

    def _take_rule(self) -> None:
        if self.selection:
            self.model.set_selection(self.selection)

    def _count(self) -> None:
        """Add up what the model reports of its last call, or what its routers were seen to say."""
        if self._borders and not self._of_experts:
            for place, found in self._borders.watched.items():
                kept = int((found[-1] >= self._borders.borders[place]).sum())
                self._counted[self.selection, "kept", place] += kept
                self._counted[self.selection, "units", place] += found[-1].numel()
        elif self.places:
            for layer, report in self.model.routing_report()["layers"].items():
                for place in self.places:
                    if place.layer == layer:
                        own = report.get(place.target, report)
                        for name in ("kept", "units", "agreed"):
                            self._counted[self.selection, name, place] += own.get(name, 0)
                        if place.target == EXPERT:
                            counts = own["tokens_executed"], own["tokens_assigned"]
                            found = torch.tensor(counts, dtype=torch.float32)
                            self._computed[place] = self._computed.get(place, 0) + found


class _WatchedLogits(LogitsProcessor):
    """Marks the rows ``[B]`` that had logits which are no numbers, and changes nothing."""

    def __init__(self, rows: int) -> None:
        self.broken = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.broken |= ~scores.isfinite().all(-1).cpu()
        return scores


class _Stop(StoppingCriteria):
    """Ends each row where ``is_finished``; calls ``after_prefill`` when that is all there was."""

    def __init__(
        self,
        is_finished: Callable[[Sequence[int]], bool],
        prompt_length: int,
        after_prefill: Callable[[], None],
    ) -> None:
        self.is_finished, self.prompt_length = is_finished, prompt_length
        self.after_prefill = after_prefill

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        if input_ids.shape[1] == self.prompt_length + 1:
            self.after_prefill()
        new = input_ids[:, self.prompt_length :].tolist()
        return torch.tensor([self.is_finished(row) for row in new], device=input_ids.device)


def _pad_left(
    prompts: Sequence[Sequence[int]], filling: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, ``[B, longest]``."""
    longest = max(map(len, prompts))
    ids = [[filling] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
