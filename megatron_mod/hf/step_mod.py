"""Decode steps by CUDA graphs: what the host would launch kernel by kernel, at once.

Where a step's time is the host's, nothing that a layer skips makes it shorter. A graph reaches from
what follows a layer's attention to what precedes the next one's, and is recorded at the first step,
one for each set of targets that may be kept. Between two of them keys and values are stored, the
attention, whose size grows, is computed as ever, and a router of tokens is asked: of one sequence
the host waits for the decision, while the device is busy with the attention, and launches what is
kept; of several, which share the weights that are read, everything but the attention of sequences
that skip it is computed, and decisions choose from it: ``y = x + m * F(x)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attention_mod import attend_at_places, project
from .cache_mod import CACHE, SequenceCacheLayer, TokenCacheLayer, check_batch
from .graph_mod import Buffers, Entered

# Of keys, in bytes: up to so many are attended to before it is known whether they need be. By
# reckoning: with their values 22 us at 3 TB/s, less than a host takes to hear and to launch.
AHEAD = 2**25


class DecodeStep:
    """A routed layer's step of single tokens ``[B, 1, H]``, by graphs."""

    def __init__(self, layer: Any, routing: Any, context: dict[str, Any]) -> None:
        """``layer``: a ``RoutedLayer``; ``routing``: the forward call's ``RoutingCall``;
        ``context``: what the family's layer takes."""
        self.layer, self.routing, self.context = layer, routing, context
        self.storage = context[CACHE].layers[layer.layer_idx]
        self.by_token = layer.router is not None and not layer.per_sequence
        self.attention: Any = None if layer.router is None else layer.attention_target
        self.kept: dict[str, bool] = {}  # by target; not routed ones are not in it
        self.masked = False  # decisions choose from what is computed of all rows
        self.decided: Tensor | None = None  # of sequences, [targets, B, 1]
        self.attends = True  # queries, keys and values are made before it is known who asks
        self.enters = True  # there is something that precedes the attention

    @classmethod
    def of(cls, layer: Any, routing: Any, context: dict[str, Any], batch: int) -> DecodeStep | None:
        """A layer's; None: there are no graphs of what it stores."""
        step, routing.graphs.following = routing.graphs.following, None
        if step is not None and step.layer is layer and step.routing is routing:
            step.context = context
            return step
        step = cls(layer, routing, context)
        return step if step._prepare(batch) else None

    def run(self, hidden_states: Tensor) -> Tensor:
        """The layer's output, in memory that the next layer may change."""
        layer, graphs = self.layer, self.routing.graphs
        rotary, channels = self.context["position_embeddings"], layer.self_attn.o_proj.in_features
        buffers = graphs.enter(self.routing, hidden_states, rotary, channels)
        entered = self._entered(buffers) if self.enters else Entered()
        following = self._following(len(hidden_states))
        asked = self.enters and self._attend(buffers, entered)
        buffers.entered = None
        if asked or any(self.kept.values()) or self._adds_to_what_is_skipped():
            key: tuple = (layer.layer_idx, "from", self.masked, *self.kept.items())
            if entered.factors or (self.masked and self.by_token):
                key += (id(entered),)  # which is read where it was recorded with it
            if following is not None:
                key += following._key
            made = graphs.run(key, lambda: self._between(buffers, entered, following), buffers)
            if following is not None:
                buffers.entered = buffers.state(following.layer.layer_idx), made
        if isinstance(self.storage, SequenceCacheLayer):
            self.storage.advance(1)
        return buffers.hidden

    def _prepare(self, batch: int) -> bool:
        """Whether there are graphs of this step; of sequences, what they keep is known then."""
        layer = self.layer
        if self.by_token and layer.stores_selected and batch > 1:
            return False
        self.masked = self.by_token and batch > 1
        if isinstance(self.storage, SequenceCacheLayer):
            check_batch(batch, cached=self.storage.batch)
            choices = self.storage.choices
            self.kept = {target: len(made.index) > 0 for target, made in choices.items()}
            self.masked = any(
                self.kept[target] and not made.is_everything for target, made in choices.items()
            )
            self.decided = self.routing.graphs.decided(layer.layer_idx, choices)
            self._note({target: made.keep for target, made in choices.items()})
        self.attends = self.kept.get(self.attention, True)
        if self.by_token:
            self.attends = not layer.is_removed
        self.enters = self.by_token or self.attends
        return True

    @property
    def _key(self) -> tuple:
        """Of what precedes the attention: all that it has in it beside weights."""
        layer, state = self.layer, ()
        if layer.router is not None:
            positions = (router.position for router in layer.routers)
            state = (*layer.logit_borders.items(), *positions)
        return (layer.layer_idx, "to", self.attends, state)

    def _following(self, batch: int) -> DecodeStep | None:
        """The next layer's step, if anything of it can be done at once."""
        layers, following = self.routing.graphs.layers, self.layer.layer_idx + 1
        if following == len(layers):
            return None
        step = DecodeStep.of(layers[following], self.routing, self.context, batch)
        self.routing.graphs.following = step
        return step if step is not None and step.enters else None

    def _entered(self, buffers: Buffers) -> Entered:
        """What precedes the attention, unless the layer before has made it."""
        if buffers.entered and buffers.entered[0] == buffers.state(self.layer.layer_idx):
            return buffers.entered[1]
        return self.routing.graphs.run(self._key, lambda: self._enter(buffers), buffers)

    def _note(self, decisions: dict[str, Tensor]) -> None:
        for target, keep in decisions.items():
            self.routing.decisions[self.layer.layer_idx, target] = keep

    def _adds_to_what_is_skipped(self) -> bool:
        """Whether a layer that keeps nothing changes its input."""
        return self.layer.stand_in is not None or not {"mlp", "block"} & set(self.layer.targets)

    def _enter(self, buffers: Buffers) -> Entered:
        """What precedes the attention, of a layer's input."""
        layer, attn = self.layer, self.layer.self_attn
        entered = Entered()
        normed = layer.input_layernorm(buffers.hidden)
        if self.attends:
            query, keys, values = (project(attn, name, normed) for name in "qkv")
            both = buffers.rotate(torch.cat([query, keys], -2))
            parts = (*both.tensor_split([query.shape[-2]], -2), values)
            entered.projected = [heads.transpose(1, 2) for heads in parts]
        if self.by_token:
            decided = []
            for target in layer.targets:
                logits, causal = layer.ask_tokens(target, normed)
                decided.append((causal >= layer.logit_borders[target]) & buffers.valid)
                if layer.capacities is not None:
                    entered.factors[target] = logits.to(normed.dtype)[..., None]
            entered.decided = torch.stack(decided)
        return entered

    def _attend(self, buffers: Buffers, entered: Entered) -> bool:
        """Whether any row asks; what it finds is in ``buffers.attended`` then."""
        if self.by_token:
            return self._attend_as_told(buffers, entered)
        if self.attends:
            rows, mask = self._rows(), self.context["attention_mask"]
            projected: Any = entered.projected
            if rows is not None:
                projected = [heads.index_select(0, rows) for heads in projected]
                if mask is not None and len(mask) > 1:
                    mask = mask.index_select(0, rows)
            query, keys, values = projected
            keys, values = self.context[CACHE].update(keys, values, self.layer.layer_idx)
            self._find(buffers, query, keys, values, mask, rows)
        return self.attends

    def _attend_as_told(self, buffers: Buffers, entered: Entered) -> bool:
        """``_attend`` of a layer whose routers decide about tokens: what they say is waited for as
        late as possible, behind an attention that the device is busy with meanwhile."""
        storage, attends = self.storage, self.attends
        selected = isinstance(storage, TokenCacheLayer)
        mask = None if selected else self.context["attention_mask"]
        projected: Any = entered.projected or (None, None, None)
        query, keys, values = projected
        if attends and not selected:
            keys, values = self.context[CACHE].update(keys, values, self.layer.layer_idx)
        decided: Any = entered.decided
        answer = decided.clone if self.masked else self.routing.graphs.ask(decided)
        ahead = attends and not selected and (self.attention is None or keys.nbytes <= AHEAD)
        if ahead:
            self._find(buffers, query, keys, values, mask)
        self._hear(answer())
        if not attends:
            self.kept[self.attention] = False
        attends = self.kept.get(self.attention, True)
        if attends and selected:
            column = torch.zeros(1, dtype=torch.int64, device=query.device)
            keys, values, _ = storage.append(keys, values, column)
        if selected or self.layer.is_removed:
            storage.advance(1)
        if attends and not ahead:
            self._find(buffers, query, keys, values, mask)
        return attends

    def _find(
        self,
        buffers: Buffers,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        rows: Tensor | None = None,
    ) -> None:
        """Put into ``buffers.attended`` what queries find, of these ``rows`` (None: of all)."""
        found = attend_at_places(self.layer.self_attn, query, keys, values, mask)
        if rows is None:
            buffers.attended.copy_(found)
        else:
            buffers.attended.index_copy_(0, rows, found)

    def _rows(self) -> Tensor | None:
        """Which sequences go through the attention ``[N]``; None: all."""
        if self.attention is None:
            return None
        choice = self.storage.choices[self.attention]
        return None if choice.is_everything else choice.index

    def _hear(self, decided: Tensor) -> None:
        """Note the decisions ``[targets, B, 1]`` of the layer's routers of tokens, and what is
        kept: of several sequences everything is computed."""
        targets = self.layer.targets
        self.kept = dict.fromkeys(targets, True)
        if not self.masked:
            self.kept = dict(zip(targets, decided.flatten().tolist(), strict=True))
        self._note(dict(zip(targets, decided, strict=True)))

    def _between(
        self, buffers: Buffers, entered: Entered, following: DecodeStep | None
    ) -> Entered | None:
        """What comes after the attention, and before the following layer's."""
        layer, x = self.layer, buffers.hidden

        def attention() -> Tensor:
            return layer.self_attn.o_proj(buffers.attended)

        def feed() -> Tensor:
            return layer.mlp(layer.post_attention_layernorm(x))

        def block() -> Tensor:
            first = attention()
            return first + layer.mlp(layer.post_attention_layernorm(x + first))

        if "block" in self.kept:
            self._add("block", x, block, layer.input_layernorm, entered)
        else:
            self._add("attn", x, attention, layer.input_layernorm, entered)
            self._add("mlp", x, feed, layer.post_attention_layernorm, entered)
        return None if following is None else following._enter(buffers)

    def _add(
        self,
        target: str,
        x: Tensor,
        update: Callable[[], Tensor],
        norm: nn.Module,
        entered: Entered,
    ) -> None:
        """To ``x`` in place, what a target gives those rows that keep it, and the stand-in, if
        there is any, those that skip it."""
        layer, given = self.layer, None
        if keeps := self.kept.get(target, True):
            given = update()
            if (factor := entered.factors.get(target)) is not None:
                given = factor * given
        if target in self.kept and (self.masked or not keeps):
            instead = None
            if layer.stand_in is not None:
                instead = layer._own(layer.stand_in, target)(norm(x))
            if given is None:
                given = instead
            elif self.masked:
                decided: Any = entered.decided if self.by_token else self.decided
                keep = decided[layer.targets.index(target)][..., None]
                given = torch.where(keep, given, 0.0 if instead is None else instead)
        if given is not None:
            x.add_(given)
