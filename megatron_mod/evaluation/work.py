"""What a model has to compute and to read, given its routers' decisions: counted, not timed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_mod.conversion.export import dense_config, routing_of
from megatron_mod.conversion.families import family_of
from megatron_mod.model.architecture import Architecture
from megatron_mod.routing.config import RoutingConfig


@dataclass(frozen=True)
class Work:
    """Counts the work of a model's layers and its output.

    Counted are the matrix products: two floating-point operations for each multiplication, of
    attention only those of a query with the keys it sees. ``routing``: ``None`` for a dense model.

    A layer's decisions are bool tensors, one entry a token; a sequence that decides as one says the
    same for all of its tokens. A layer whose threshold is 1 is removed for good: nobody will ever
    ask for its keys and values, so none are made, with ``keys_values = all`` neither.
    """

    arch: Architecture
    routing: RoutingConfig | None = None

    @classmethod
    def of(cls, hf_config: dict, path: Path = Path("config.json")) -> Work:
        """Of a model with this ``config.json``, an export's or a dense one's; ``path`` is the
        file's, for messages.

        Raises:
            ValueError: a family that is not supported, or a broken ``routing`` entry.
        """
        dense = dense_config(hf_config)
        return cls(family_of(dense).architecture_of(dense), routing_of(hf_config, path))

    def at(self, thresholds: Sequence[float]) -> Work:
        """Of the same model with other thresholds, one per routed layer."""
        return replace(self, routing=replace(self.routing, threshold=tuple(thresholds)))

    def prefill(self, length: int, kept: Mapping[int, Tensor]) -> int:
        """Floating-point operations of one sequence's forward pass, up to its last token's logits.

        Args:
            length: tokens of the sequence, S.
            kept: each routed layer's decisions ``[S]``.
        """
        arch = self.arch
        dense = self._layer(torch.ones(length, dtype=torch.bool), routed=None)
        layers = dense * (arch.num_layers - len(kept))
        for layer, decisions in kept.items():
            layers += self._layer(decisions, routed=layer)
            layers += 2 * arch.hidden_size * length  # the router
            layers += 2 * self._stand_in_weights * int(decisions.logical_not().sum())
        return layers + 2 * arch.hidden_size * arch.vocab_size

    def decode_bytes(
        self,
        stored: Sequence[int],
        kept: Mapping[int, Tensor],
        stored_by: Mapping[int, Sequence[int]],
        *,
        element_size: int,
    ) -> int:
        """Bytes of weights and cached keys and values that one decode step of a batch reads.

        A weight is read once if any sequence needs it, the cache of those that attend.

        Args:
            stored: tokens of each sequence so far, ``B`` of them.
            kept: each routed layer's decisions ``[B]`` in this step.
            stored_by: how many keys each sequence has in each routed layer's cache.
            element_size: bytes of a weight.
        """
        arch = self.arch
        elements = arch.hidden_size * arch.vocab_size
        for layer in range(arch.num_layers):
            decisions = kept.get(layer)
            if decisions is None:
                elements += arch.query_weights + arch.key_weights + arch.mlp_weights
                elements += 2 * arch.key_channels * sum(map(self._in_window, stored))
                continue
            elements += arch.hidden_size  # the router, of fp32: too little to tell apart
            elements += self._stand_in_weights * (not decisions.all())
            some, scheme = bool(decisions.any()), self.routing.scheme
            attends = some or not scheme.covers_attention
            needs_keys = attends or self._offers_all_keys(layer)
            elements += arch.query_weights * attends + arch.key_weights * needs_keys
            elements += arch.mlp_weights * (some or not scheme.covers_mlp)
            readers = decisions.tolist() if scheme.covers_attention else [True] * len(stored)
            read = [n for n, reads in zip(stored_by[layer], readers, strict=True) if reads]
            elements += 2 * arch.key_channels * sum(map(self._in_window, read))
        return elements * element_size

    def _layer(self, kept: Tensor, *, routed: int | None) -> int:
        """Floating-point operations of this routed layer, or of a dense one, over a sequence."""
        arch, scheme = self.arch, None if routed is None else self.routing.scheme
        length, chosen = len(kept), int(kept.sum())
        everyone = torch.ones_like(kept)
        queries, keys = everyone, everyone
        if scheme and scheme.covers_attention:
            queries = kept
            keys = everyone if self._offers_all_keys(routed) else kept
        mlp = chosen if scheme and scheme.covers_mlp else length
        return (
            2 * arch.query_weights * int(queries.sum())
            + 2 * arch.key_weights * int(keys.sum())
            + 4 * arch.query_channels * self._pairs(queries, keys)
            + 2 * arch.mlp_weights * mlp
        )

    def _offers_all_keys(self, layer: int) -> bool:
        """Whether units that skip this routed layer make keys and values for those that do not."""
        is_removed = self.routing.logit_border(layer) == math.inf
        return self.routing.keys_values == "all" and not is_removed

    def _pairs(self, queries: Tensor, keys: Tensor) -> int:
        """How many keys all queries see together; both bool ``[S]``."""
        visible = keys.cumsum(0)
        if window := self.arch.window_size:
            gone = torch.zeros_like(visible)
            gone[window:] = visible[:-window]
            visible = visible - gone
        return int(visible[queries].sum())

    def _in_window(self, tokens: int) -> int:
        window = self.arch.window_size
        return min(tokens, window - 1) if window else tokens

    @property
    def _stand_in_weights(self) -> int:
        return 2 * self.arch.hidden_size * (self.routing.stand_in_rank or 0)
