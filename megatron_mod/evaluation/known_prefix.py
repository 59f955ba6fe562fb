"""Runs an export over the same texts again and again, below its first routed layer only once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

MOST_BYTES = 1 << 30  # of hidden states that are kept; later texts are run whole


class KnownPrefix:
    """An export to call with any thresholds, without a cache: no threshold changes what enters its
    first routed layer, so that is kept.

    It takes the place of embeddings, and the layers below pass it on. None of the exports' families
    does anything to embeddings before its first layer.

    Args:
        first: index of the export's first routed layer.
    """

    def __init__(self, model, first: int) -> None:
        self.model, self.first = model, first
        self.known: dict[tuple[str, ...], Tensor] = {}  # what enters, [B, S, H], by text and mask
        self.held = 0

    def __call__(self, input_ids: Tensor, *, attention_mask: Tensor, **settings: Any) -> Any:
        """As the model."""
        text = tuple(str(part.tolist()) for part in (input_ids, attention_mask))
        if text in self.known:
            with self._passing_on():
                states = self.known[text]
                return self.model(inputs_embeds=states, attention_mask=attention_mask, **settings)
        with self._keeping(text):
            return self.model(input_ids, attention_mask=attention_mask, **settings)

    @contextmanager
    def _passing_on(self) -> Iterator[None]:
        decoder = self.model.model
        layers = decoder.layers
        below = [_PassingLayer(layer) for layer in layers[: self.first]]
        decoder.layers = nn.ModuleList([*below, *layers[self.first :]])
        try:
            yield
        finally:
            decoder.layers = layers

    @contextmanager
    def _keeping(self, text: tuple[str, ...]) -> Iterator[None]:
        def keep(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            (states,) = arguments
            size = states.numel() * states.element_size()
            if self.held + size <= MOST_BYTES:
                self.known[text] = states
                self.held += size

        handle = self.model.model.layers[self.first].register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()


class _PassingLayer(nn.Module):
    """In a decoder layer's place; Transformers finds a layer's mask by its ``attention_type``, and
    OLMoE's of 4.57 returns a tuple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.returns_tuple = getattr(layer, "returns_tuple", False)

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor | tuple[Tensor]:
        return (hidden_states,) if self.returns_tuple else hidden_states
