"""Scoring and generation on a Megatron model under tensor, pipeline and data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_mod.evaluation.backend import CAUSAL, NOT_FINITE, Backend
from megatron_mod.evaluation.rows import (
    Row,
    Score,
    collate_rows,
    label_scores,
    scores,
)
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.forward import Outcome, most_passes, run_batches
from megatron_mod.model.head import CHUNK
from megatron_mod.model.layout import StepContext
from megatron_mod.parallel import device
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.decision import Decisions
from megatron_mod.routing.expert_router import ExpertRouter
from megatron_mod.routing.scheme import Place


class MegatronBackend(Backend):
    """A backend on this rank's part of a Megatron model; see ``Backend``."""

    def __init__(
        self,
        model: ModelChunks,
        tokenizer,
        *,
        max_length: int | None = None,
        batch_size: int = 1,
        pooling: str | None = None,
        selection: str | None = None,
    ) -> None:
        routing = _routing_of_all_stages(model)
        super().__init__(
            tokenizer,
            positions=model[0].max_sequence_length,
            max_length=max_length,
            batch_size=batch_size,
            routing=routing,
            pooling=pooling,
            selection=selection,
            data_rank=model.groups.dp.rank(),
            data_ranks=model.groups.dp.size(),
        )
        self.model = model.eval()
        self.places = routing.places if routing else ()
        self.thresholds = routing.thresholds if routing else ()
        for layer in model.routed_layers().values():
            # Rows say what a decision sees, whatever the routers were trained with.
            layer.routing = replace(routing, pooling=self.pooling and "prompt")
        self._counted: dict[str | None, Tensor] = {}
        self._watched: dict[Place, list[Tensor]] = {}

    def _experts(self) -> dict[Place, Tensor]:
        is_copy = self.model.groups.tp.rank() > 0
        mine = {} if is_copy else self.model.routers()
        return {
            place: router.by_expert.cpu()
            for place, router in mine.items()
            if isinstance(router, ExpertRouter)
        }

    def _counts(self) -> Tensor:
        """Only the first tensor-parallel rank's: the others hold copies."""
        is_copy = self.model.groups.tp.rank() > 0
        counted = self._counts_by_rule()
        return torch.zeros_like(counted) if is_copy else counted

    def _counts_by_rule(self) -> Tensor:
        """Those of the selection that is set, to be added to."""
        none = torch.zeros(3, len(self.places), dtype=torch.float64)
        return self._counted.setdefault(self.selection, none)

    @contextmanager
    def _deciding_by(self, thresholds: Sequence[float]) -> Iterator[dict[Place, list[Tensor]]]:
        self._watched = {place: [] for place in self.model.routers()}
        self._set_thresholds(thresholds)
        try:
            yield self._watched
        finally:
            self._watched = {}
            self._set_thresholds(self.thresholds)

    def _set_thresholds(self, thresholds: Sequence[float]) -> None:
        for layer in self.model.routed_layers().values():
            layer.routing = replace(layer.routing, threshold=tuple(thresholds))

    def _watch(self, decisions: Mapping[Place, Decisions]) -> None:
        for place, made in decisions.items():
            if place in self._watched:
                logits, valid = map(_by_row, (made.logits, made.valid))
                self._watched[place].append(logits[valid])

    def _score(self, batches: Collection[Sequence[Row]]) -> list[list[Score]]:
        return self._run(batches, read=_scores)

    def _generate(
        self,
        batches: Sequence[Sequence[Sequence[int]]],
        *,
        until: Sequence[str],
        max_new_tokens: int,
    ) -> list[list[list[int]]]:
        """Every step runs all texts anew from their start, with the prompts' decisions."""
        prompts = [prompt for batch in batches for prompt in batch]
        new: list[list[int]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        for step in self._shown(range(max_new_tokens), "generating"):
            rows = [Row.prompt([*prompts[i], *new[i]], context=len(prompts[i])) for i in active]
            cut = [
                rows[first : first + self.batch_size]
                for first in range(0, len(rows), self.batch_size)
            ]
            found = self._run(cut, read=_likeliest, counted=step == 0)
            for index, token in zip(active, self._from_last_stage(found, len(rows)), strict=True):
                new[index].append(token)
            active = [index for index in active if not self.is_finished(new[index], until)]
            if not most_passes(self.model, len(active)):
                break
        tokens = iter(new)
        return [[next(tokens) for _ in batch] for batch in batches]

    def _run(
        self,
        batches: Collection[Sequence[Row]],
        *,
        read: Callable[[Outcome], list],
        counted: bool = True,
    ) -> list[list]:
        routers = self.model.routers()
        for router in routers.values():
            router.reset()
        cut = map(collate_rows, batches)
        step = StepContext(causal=self.selection == CAUSAL)
        found = run_batches(
            self.model, cut, len(batches), finish=read, step=step, watch=self._watch
        )
        if counted:
            for number, place in enumerate(self.places):
                if place in routers:
                    noted = routers[place]
                    sums = torch.stack((noted.kept, noted.valid, noted.agreed))
                    self._counts_by_rule()[:, number] += sums.cpu()
        return found

    def _from_last_stage(self, found: list[list[int]], count: int) -> list[int]:
        """What the last pipeline stage found, on all stages."""
        tokens = torch.zeros(count, dtype=torch.int64, device=device.device())
        if found:
            tokens = torch.tensor([token for batch in found for token in batch]).to(tokens)
        stages = self.model.groups.pp
        dist.broadcast(tokens, src=dist.get_process_group_ranks(stages)[-1], group=stages)
        return tokens.tolist()


def _by_row(units: Tensor) -> Tensor:
    """``[D]`` of documents as it is, ``[S, B, ...]`` of tokens row by row."""
    return units if units.dim() == 1 else units.transpose(0, 1)


def _routing_of_all_stages(model: ModelChunks) -> RoutingConfig | None:
    """The routing of the whole model; a stage without routers cannot tell by itself."""
    found: list = [None] * dist.get_world_size()
    mine = next((layer.routing for layer in model.routed_layers().values()), None)
    dist.all_gather_object(found, mine)
    return next(filter(None, found), None)


def _scores(outcome: Outcome) -> list[Score]:
    chunks = zip(outcome.states().split(CHUNK), outcome.labels.split(CHUNK), strict=True)
    found = [label_scores(_logits(outcome, part), labels) for part, labels in chunks]
    nats, wrong = map(torch.cat, zip(*found, strict=True))
    return scores(nats, wrong, outcome.places[0], outcome.batch)


def _likeliest(outcome: Outcome) -> list[int]:
    """The token after each row's last, or ``NOT_FINITE``."""
    last = torch.tensor([length - 1 for (length,) in outcome.batch.documents])
    places = torch.arange(len(last)), last
    logits = _logits(outcome, outcome.states(tuple(p.to(device.device()) for p in places)))
    return logits.argmax(-1).where(logits.isfinite().all(-1), NOT_FINITE).tolist()


def _logits(outcome: Outcome, states: Tensor) -> Tensor:
    """``[N, vocab]`` of final hidden states ``[N, H]``, on every tensor-parallel rank."""
    model = outcome.model
    return gather_from_tensor_model_parallel_region(model.head(states))[
        :, : model.unpadded_vocab_size
    ]
