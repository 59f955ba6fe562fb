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
from megatron_mod.routing.scheme import EXPERT, Place

FP32 = 4  # bytes of a number


@dataclass(frozen=True)
class Work:
    """Counts the work of a model's layers and its output.

    Counted are the matrix products: two floating-point operations for each multiplication, of
    attention only those of a query with the keys it sees. ``routing``: ``None`` for a dense model.
    Routers and, of exact ones, the predictors of the causal rule see every token.

    Decisions are bool tensors, by the router's place, one entry a token, or one for each of the
    ``k`` experts that a token is sent to (``[S * k]``, token by token); a sequence that decides as
    one says the same for all of its tokens. An attention whose threshold is 1 is removed for good:
    nobody will ever ask for its keys and values, so none are made, with ``keys_values = all``
    neither.
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
        """Of the same model with other thresholds, one per router."""
        return replace(self, routing=replace(self.routing, threshold=tuple(thresholds)))

    def prefill(self, length: int, kept: Mapping[Place, Tensor]) -> int:
        """Floating-point operations of one sequence's forward pass, up to its last token's logits.

        Args:
            length: tokens of the sequence, S.
            kept: each router's decisions ``[S]``, or ``[S * k]``.
        """
        arch = self.arch
        everyone = torch.ones(length, dtype=torch.bool)
        routed = {place.layer for place in kept}
        found = self._layer(everyone, everyone, everyone) * (arch.num_layers - len(routed))
        for layer in routed:
            attending, feeding = self._parts(layer, kept, everyone)
            keys = everyone if self._offers_all_keys(layer) else attending
            found += self._layer(attending, keys, feeding) - self._spared(layer, kept)
        found += sum(map(self._deciding, kept.values()))
        return found + 2 * arch.hidden_size * arch.vocab_size

    def decode(
        self,
        stored: Sequence[int],
        kept: Mapping[Place, Tensor],
        stored_by: Mapping[int, Sequence[int]],
    ) -> int:
        """Floating-point operations of one decode step of a batch: a token of each sequence.

        Args:
            stored: tokens of each sequence so far, ``B`` of them.
            kept: each router's decisions ``[B]`` in this step.
            stored_by: how many keys each sequence has in each routed layer's cache.
        """
        arch = self.arch
        everyone = torch.ones(len(stored), dtype=torch.bool)
        found = 2 * arch.hidden_size * arch.vocab_size * len(stored)
        for layer in range(arch.num_layers):
            attending, feeding = self._parts(layer, kept, everyone)
            offering = everyone if self._offers_all_keys(layer) else attending
            found += 2 * arch.query_weights * int(attending.sum())
            found += 2 * arch.key_weights * int(offering.sum())
            found += 2 * arch.mlp_weights * int(feeding.sum()) - self._spared(layer, kept)
            held = zip(stored_by.get(layer, stored), attending.tolist(), strict=True)
            seen = [self._in_window(tokens) + 1 for tokens, attends in held if attends]
            found += 4 * arch.query_channels * sum(seen)
        return found + sum(map(self._deciding, kept.values()))

    def decode_bytes(
        self,
        stored: Sequence[int],
        kept: Mapping[Place, Tensor],
        stored_by: Mapping[int, Sequence[int]],
        *,
        element_size: int,
    ) -> int:
        """Bytes of weights and cached keys and values that one decode step of a batch reads.

        A weight is read once if any sequence needs it, the cache of those that attend. Which
        experts these need is not known: as many as may be, each another one as long as there are
        others.

        Args:
            stored: tokens of each sequence so far, ``B`` of them.
            kept: each router's decisions ``[B]`` in this step.
            stored_by: how many keys each sequence has in each routed layer's cache.
            element_size: bytes of a weight.
        """
        arch = self.arch
        everyone = torch.ones(len(stored), dtype=torch.bool)
        elements = arch.hidden_size * arch.vocab_size
        for layer in range(arch.num_layers):
            attending, feeding = self._parts(layer, kept, everyone)
            attends = bool(attending.any())
            needs_keys = attends or self._offers_all_keys(layer)
            own = kept.get(Place(layer, EXPERT))
            pairs = int(feeding.sum()) * arch.top_k if own is None else int(own.sum())
            elements += arch.query_weights * attends + arch.key_weights * needs_keys
            elements += arch.gate_weights * bool(feeding.any())
            elements += arch.expert_weights * min(arch.num_experts, pairs)
            held = zip(stored_by.get(layer, stored), attending.tolist(), strict=True)
            read = [tokens for tokens, reads in held if reads]
            elements += 2 * arch.key_channels * sum(map(self._in_window, read))
        for decisions in kept.values():
            elements += self._router_weights  # of fp32: too little to tell apart
            elements += self._stand_in_weights * (not decisions.all())
        return elements * element_size + FP32 * self._predictor_weights * len(kept)

    def _deciding(self, decisions: Tensor) -> int:
        """Floating-point operations of a router that decided ``[N]``, and of what stands in for
        those it skips."""
        router = self._router_weights + self._predictor_weights
        skipped = int(decisions.logical_not().sum())
        tokens = len(decisions) // self._units_per_token
        return 2 * router * tokens + 2 * self._stand_in_weights * skipped

    def entries(self, length: int) -> int:
        """Of a router's decisions about a sequence of this length."""
        return length * self._units_per_token

    def _spared(self, layer: int, kept: Mapping[Place, Tensor]) -> int:
        """Floating-point operations of a layer's experts that tokens are sent to and not computed
        by."""
        decisions = kept.get(Place(layer, EXPERT))
        if decisions is None:
            return 0
        return 2 * self.arch.expert_weights * int(decisions.logical_not().sum())

    def _parts(
        self, layer: int, kept: Mapping[Place, Tensor], everyone: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Who goes through a layer's attention, and who through its MLP: bool as ``everyone``."""
        if self.routing is None:
            return everyone, everyone
        scheme = self.routing.scheme
        targets = (scheme.attention_target, scheme.mlp_target)
        attending, feeding = (
            everyone if target is None else kept.get(Place(layer, target), everyone)
            for target in targets
        )
        return attending, feeding

    def _layer(self, queries: Tensor, keys: Tensor, feeding: Tensor) -> int:
        """Floating-point operations of a layer over a sequence, of which so many tokens attend,
        are attended to, and go through the MLP; all bool ``[S]``."""
        arch = self.arch
        return (
            2 * arch.query_weights * int(queries.sum())
            + 2 * arch.key_weights * int(keys.sum())
            + 4 * arch.query_channels * self._pairs(queries, keys)
            + 2 * arch.mlp_weights * int(feeding.sum())
        )

    def _offers_all_keys(self, layer: int) -> bool:
        """Whether units that skip this routed layer's attention make keys and values for those that
        do not."""
        target = self.routing and self.routing.scheme.attention_target
        if target is None:
            return True
        is_removed = self.routing.logit_border(Place(layer, target)) == math.inf
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
    def _by_expert(self) -> bool:
        """Whether a unit is a pair of token and expert."""
        return self.routing is not None and self.routing.scheme.per_expert

    @property
    def _units_per_token(self) -> int:
        return self.arch.top_k if self._by_expert else 1

    @property
    def _router_weights(self) -> int:
        noops = self.routing and self.routing.num_noop_experts
        rows = noops or (self.arch.num_experts if self._by_expert else 1)
        return self.arch.hidden_size * rows

    @property
    def _predictor_weights(self) -> int:
        """``P * (H + 1)`` of a predictor of hidden size ``P``."""
        size = self.routing.predictor_size if self.routing else None
        return (size or 0) * (self.arch.hidden_size + 1)

    @property
    def _stand_in_weights(self) -> int:
        return 2 * self.arch.hidden_size * (self.routing.stand_in_rank or 0)
