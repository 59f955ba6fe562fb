"""Runs an export over the same texts again and again, below the first new decision only once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from megatron_mod.routing.config import logit_border
from megatron_mod.routing.scheme import Place

MOST_BYTES = 1 << 30  # of hidden states that are kept, of first routed layers and of later ones


class WatchedBorders:
    """Tells an export its borders, as its ``CapacityBorders`` does, and keeps the logits."""

    def __init__(self, places: Sequence[Place], thresholds: Sequence[float]) -> None:
        pairs = zip(places, thresholds, strict=True)
        self.borders = {place: logit_border(threshold) for place, threshold in pairs}
        self.watched: dict[Place, list[Tensor]] = {place: [] for place in places}

    def find(self, place: tuple[int, str], logits: Tensor) -> float:
        at = Place(*place)
        self.watched[at].append(logits)
        return self.borders[at]

    def below(self, layer: int) -> dict[Place, float]:
        """Those of the routers below a layer."""
        return {place: border for place, border in self.borders.items() if place.layer < layer}


class Known(NamedTuple):
    """What enters a layer, ``[B, S, H]``, where the routers below had these borders, and logits."""

    states: Tensor
    borders: dict[Place, float]
    logits: dict[Place, Tensor]


class KnownPrefix:
    """An export to call with any borders, without a cache: a border changes nothing of what enters
    its own layer, so that is kept.

    It takes the place of embeddings, and the layers below pass it on. None of the exports' families
    does anything to embeddings before its first layer.

    Args:
        layers: routed ones at which a call may begin, in ascending order; ``routing_report`` says
            nothing of those that a call has passed on.
    """

    def __init__(self, model, layers: Sequence[int]) -> None:
        self.model, self.layers = model, layers
        # By text, masks and the budget that routers are told, and by layer.
        self.known: dict[tuple[str, ...], dict[int, Known]] = {}
        self.room = dict.fromkeys((True, False), MOST_BYTES)  # of the first layer's, and of others'

    def __call__(
        self, input_ids: Tensor, *, attention_mask: Tensor, borders: WatchedBorders, **settings: Any
    ) -> Any:
        """As the model."""
        masks = (attention_mask, settings.get("routing_mask"))
        parts = [part.tolist() for part in (input_ids, *masks) if part is not None]
        budget = self.model.config.work_position()
        known = self.known.setdefault(tuple(map(str, (*parts, budget))), {})
        settings |= {"attention_mask": attention_mask, "borders": borders}
        alike = [layer for layer, its in known.items() if its.borders == borders.below(layer)]
        at = max(alike, default=None)
        with self._keeping(known, borders, above=-1 if at is None else at):
            if at is None:
                return self.model(input_ids, **settings)
            for place, logits in known[at].logits.items():
                borders.watched[place].append(logits)
            with self._passing_on(at):
                return self.model(inputs_embeds=known[at].states, **settings)

    @contextmanager
    def _passing_on(self, first: int) -> Iterator[None]:
        decoder = self.model.model
        layers = decoder.layers
        below = [_PassingLayer(layer) for layer in layers[:first]]
        decoder.layers = nn.ModuleList([*below, *layers[first:]])
        try:
            yield
        finally:
            decoder.layers = layers

    @contextmanager
    def _keeping(
        self, known: dict[int, Known], borders: WatchedBorders, *, above: int
    ) -> Iterator[None]:
        """Takes what enters layers into ``known``, and gives up what entered them before."""

        def keep(layer: int, states: Tensor) -> None:
            size, is_first = states.numel() * states.element_size(), layer == self.layers[0]
            if layer not in known:
                if size > self.room[is_first]:
                    return
                self.room[is_first] -= size
            below = borders.below(layer)
            logits = {place: borders.watched[place][-1] for place in below}
            known[layer] = Known(states, below, logits)

        with ExitStack() as hooks:
            for layer in self.layers:
                if layer > above:
                    hook = self.model.model.layers[layer].register_forward_pre_hook(
                        lambda _, arguments, layer=layer: keep(layer, *arguments)
                    )
                    hooks.callback(hook.remove)
            yield


class _PassingLayer(nn.Module):
    """In a decoder layer's place; Transformers finds a layer's mask by its ``attention_type``, and
    OLMoE's of 4.57 returns a tuple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.returns_tuple = getattr(layer, "returns_tuple", False)

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor | tuple[Tensor]:
        return (hidden_states,) if self.returns_tuple else hidden_states
