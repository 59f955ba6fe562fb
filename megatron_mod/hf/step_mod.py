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
from torch.nn.functional import scaled_dot_product_attention

from .attention_mod import project, together
from .cache_mod import CACHE, SequenceCacheLayer, TokenCacheLayer, check_batch
from .graph_mod import Buffers, Entered

# Of keys, in bytes: up to so many are attended to before it is known whether they need be. By
# reckoning: with their values 22 us at 3 TB/s, less than a host takes to hear and to launch.
AHEAD = 2**25


class DecodeStep:
    """A routed layer's steps of single tokens ``[B, 1, H]``, by graphs: made once, for one forward
    call after another."""

    routing: Any = None  # the ``RoutingCall`` of the forward call that it is ready for
    context: Any = None  # what the family's layer takes in it
    storage: Any = None  # the layer's in its cache

    def __init__(self, layer: Any) -> None:
        """``layer``: a ``RoutedLayer``."""
        self.layer, self.index, attn = layer, layer.layer_idx, layer.self_attn
        self.scaling, self.groups = attn.head_dim**-0.5, attn.k_proj.out_features // attn.head_dim
        each = attn.o_proj.in_features // (self.groups * attn.head_dim)
        self.heads = self.groups, each, attn.head_dim
        is_routed = layer.router is not None
        self.by_token = is_routed and not layer.per_sequence
        self.attention: Any = layer.attention_target if is_routed else None
        # Whether a layer that keeps nothing changes its input.
        self.always_adds = is_routed and (
            layer.stand_in is not None or not {"mlp", "block"} & set(layer.targets)
        )

    @classmethod
    def of(cls, layer: Any, routing: Any, context: dict[str, Any], batch: int) -> DecodeStep | None:
        """A layer's, ready for a forward call; None: there are no graphs of what it stores."""
        steps, index = routing.graphs.steps, layer.layer_idx
        if index not in steps:
            steps[index] = cls(layer)
        step = steps[index]
        if step.routing is not routing:
            step._prepare(routing, context[CACHE].layers[index], batch)
        if not step.works:
            return None
        step.context = context
        return step

    def run(self, hidden_states: Tensor) -> Tensor:
        """The layer's output, in memory that the next layer may change."""
        graphs, rotary = self.routing.graphs, self.context["position_embeddings"]
        buffers = graphs.enter(self.routing, hidden_states, rotary, self.heads)
        entered = self._entered(buffers) if self.enters else Entered()
        following = self._following(hidden_states.shape[0])
        asked = self.enters and self._attend(buffers, entered)
        buffers.entered = None
        if asked or self.always_adds or any(self.kept.values()):
            key: tuple = (self.index, "from", self.masked, *self.kept.items())
            if entered.factors or (self.masked and self.by_token):
                key += (id(entered),)  # which is read where it was recorded with it
            if following is not None:
                key += following._key
            made = graphs.run(key, lambda: self._between(buffers, entered, following), buffers)
            if following is not None:
                buffers.entered = buffers.state(following.index), made
        if self.by_token:  # when the device has something to do
            self._note(dict(zip(self.layer.targets, self.told, strict=True)))
        elif isinstance(self.storage, SequenceCacheLayer):
            self.storage.advance(1)
        self.routing = self.context = self.storage = None  # the cache is not kept alive
        return buffers.hidden

    def _prepare(self, routing: Any, storage: Any, batch: int) -> None:
        """Get ready for a forward call: of sequences, what they keep is known then."""
        layer, self.routing = self.layer, routing
        self.kept: dict[str, bool] = {}  # by target; not routed ones are not in it
        self.decided: Tensor | None = None  # of sequences, [targets, B, 1]
        self.told: Any = None  # of tokens, what is to be reported, as many
        self.masked = self.by_token and batch > 1  # decisions choose from what all rows have
        self.works = not (self.masked and layer.stores_selected)
        if not self.works:
            return
        self.storage = storage
        if isinstance(storage, SequenceCacheLayer):
            check_batch(batch, cached=storage.batch)
            choices = storage.choices
            self.kept = {target: len(made.index) > 0 for target, made in choices.items()}
            self.masked = any(
                self.kept[target] and not made.is_everything for target, made in choices.items()
            )
            self.decided = routing.graphs.decided(self.index, choices)
            self._note({target: made.keep for target, made in choices.items()})
        # Queries, keys and values are made before it is known who asks.
        self.attends = self.kept.get(self.attention, True)
        if self.by_token:
            self.attends = not layer.is_removed
        self.enters = self.by_token or self.attends  # there is something before the attention

    @property
    def _key(self) -> tuple:
        """Of what precedes the attention: all that it has in it beside weights."""
        layer, state = self.layer, ()
        if self.by_token:
            positions = (router.position for router in layer.routers)
            state = (*layer.logit_borders.items(), *positions)
        return (self.index, "to", self.attends, state)

    def _following(self, batch: int) -> DecodeStep | None:
        """The next layer's step, if anything of it can be done at once."""
        layers, following = self.routing.graphs.layers, self.index + 1
        if following == len(layers):
            return None
        step = DecodeStep.of(layers[following], self.routing, self.context, batch)
        return step if step is not None and step.enters else None

    def _entered(self, buffers: Buffers) -> Entered:
        """What precedes the attention, unless the layer before has made it."""
        if buffers.entered and buffers.entered[0] == buffers.state(self.index):
            return buffers.entered[1]
        return self.routing.graphs.run(self._key, lambda: self._enter(buffers), buffers)

    def _note(self, decisions: dict[str, Tensor]) -> None:
        for target, keep in decisions.items():
            self.routing.decisions[self.index, target] = keep

    def _enter(self, buffers: Buffers) -> Entered:
        """What precedes the attention, of a layer's input."""
        layer, attn = self.layer, self.layer.self_attn
        entered = Entered()
        normed = layer.input_layernorm(buffers.hidden)
        if self.attends:
            query, keys, values = (project(attn, name, normed) for name in "qkv")
            both = buffers.rotate(torch.cat([query, keys], -2))
            parts = (*both.tensor_split([query.shape[-2]], -2), values)
            query, keys, values = (heads.transpose(1, 2) for heads in parts)
            entered.projected = [together(query, groups=self.groups), keys, values]
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
            keys, values = self.context[CACHE].update(keys, values, self.index)
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
            keys, values = self.context[CACHE].update(keys, values, self.index)
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
        found = scaled_dot_product_attention(query, keys, values, mask, scale=self.scaling)
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
        """Take on the decisions ``[targets, B, 1]`` of the layer's routers of tokens, and what is
        kept: of several sequences everything is computed."""
        targets, self.told = self.layer.targets, decided
        if self.masked:
            self.kept = dict.fromkeys(targets, True)
        else:
            self.kept = dict(zip(targets, decided.flatten().tolist(), strict=True))

    def _between(
        self, buffers: Buffers, entered: Entered, following: DecodeStep | None
    ) -> Entered | None:
        """What comes after the attention, and before the following layer's."""
        layer, x = self.layer, buffers.hidden

        def attention() -> Tensor:
            return layer.self_attn.o_proj(buffers.attended.flatten(1)[:, None])

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
