"""What an export gains over the dense model in it, timed on the prompts of a calibration text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from megatron_mod.evaluation import speed
from megatron_mod.evaluation.rows import Row, evenly

PROMPTS = 8
NEW_TOKENS = 8


@contextmanager
def unrouted(model) -> Iterator[None]:
    """The export runs as the dense model it was made from."""
    routing, layers = model.config.routing, model.model.layers
    routers = {index: layers[index].router for index in routing["layers"]}
    model.config.routing = {**routing, "layers": []}
    for index in routers:
        layers[index].router = None
    try:
        yield
    finally:
        model.config.routing = routing
        for index, router in routers.items():
            layers[index].router = router


class _Unrouted:
    """An export to call as the dense model in it."""

    def __init__(self, model) -> None:
        self.model, self.device = model, model.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with unrouted(self.model):
            return self.model(*args, **kwargs)


class ExportTiming:
    """Prefill and decode of single prompts, dense and routed in turn.

    Prompts are those of ``PROMPTS`` rows, evenly spaced by length: of a conversation what comes
    before its answer, of a text a whole window.
    """

    def __init__(self, model, rows: Sequence[Row]) -> None:
        self.model = model
        prompts = [row.ids[: row.context] if row.context > 1 else row.ids for row in rows]
        prompts.sort(key=len)
        chosen = evenly(prompts, PROMPTS)
        self.prompts: list[Tensor] = [torch.tensor([list(ids)]) for ids in chosen]

    @property
    def mean_length(self) -> float:
        """Tokens of a prompt."""
        return fmean(prompt.shape[1] for prompt in self.prompts)

    def __call__(self, thresholds: Sequence[float]) -> tuple[float, float]:
        """Speed-up of all prompts' prefills together, and of all decode steps together."""
        self.model.set_thresholds(list(thresholds))
        models = [_Unrouted(self.model), self.model]
        times = [speed.compare(models, [one], new_tokens=NEW_TOKENS) for one in self.prompts]
        dense, routed = zip(*times, strict=True)
        return (
            sum(t.prefill_s for t in dense) / sum(t.prefill_s for t in routed),
            sum(t.decode_s for t in dense) / sum(t.decode_s for t in routed),
        )
