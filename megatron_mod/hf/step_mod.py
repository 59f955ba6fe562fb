"""Decode steps by CUDA graphs: what the host would launch kernel by kernel, at once.

Where a step's time is the host's, nothing that a layer skips makes it shorter. A graph reaches from
where a layer has something to decide to where the next one has: layers without routers are whole
in it, their attention too, of keys and values in the graphs' own memory. It is recorded at the
first step, one for each set of targets that may be kept.

A router of tokens is asked between two graphs: of one sequence the host waits for the decision,
while the device is busy with the attention, and launches what is kept; of several, which share the
weights that are read, everything but the attention of sequences that skip it is computed, and
decisions choose from it: ``y = x + m * F(x)``. An attention of many keys, of some of a batch's
sequences, of chosen tokens or within a window is computed as ever between two graphs, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.modules import module

from .attention_mod import attend_in_parts, project, together
from .buffers_mod import AHEAD, Buffers, Entered
from .cache_mod import CACHE, SequenceCacheLayer, check_batch


class DecodeStep:
    """A routed layer's steps of single tokens ``[B, 1, H]``, by graphs: made once, for one forward
    call after another."""

    routing: Any = None  # the ``RoutingCall`` of the forward call that it is ready for
    storage: Any = None  # the layer's in its cache
    is_static = False  # whether keys and values are in the graphs' memory
    masked = False  # whether decisions choose from what all rows have
    waits = False  # whether the host does, for a decision about a token
    attends = True  # whether queries, keys and values are made
    enters = True  # whether there is anything before the attention
    decided: Tensor | None = None  # of sequences, [targets, B, 1]
    told: Any = None  # of tokens, what is to be reported, as many

    def __init__(self, layer: Any) -> None:
        """``layer``: a ``RoutedLayer``."""
        self.layer, self.index, attn = layer, layer.layer_idx, layer.self_attn
        self.scaling, self.groups = attn.head_dim**-0.5, attn.k_proj.out_features // attn.head_dim
        each = attn.o_proj.in_features // (self.groups * attn.head_dim)
        self.heads = self.groups, each, attn.head_dim
        self.kept: dict[str, bool] = {}  # by target; not routed ones are not in it
        self.routers = layer.routers
        self.is_routed = layer.router is not None
        self.by_token = self.is_routed and not layer.per_sequence
        self.selects = self.by_token and layer.stores_selected
        self.attention: Any = layer.attention_target if self.is_routed else None
        # Whether a layer that keeps nothing changes its input.
        self.always_adds = self.is_routed and (
            layer.stand_in is not None or not {"mlp", "block"} & set(layer.targets)
        )

    @classmethod
    def of(cls, layer: Any, routing: Any, batch: int) -> DecodeStep | None:
        """A layer's; None: there are no graphs of what it stores."""
        steps, index = routing.graphs.steps, layer.layer_idx
        if index not in steps:
            steps[index] = cls(layer)
        return None if steps[index].selects and batch > 1 else steps[index]

    def run(self, hidden_states: Tensor, routing: Any, context: dict[str, Any]) -> Tensor:
        """The layer's output, in memory that the next layer may change, or that of a layer behind
        it, which has been through what is between them."""
        rotary, stored = context["position_embeddings"], context[CACHE].layers
        tokens = stored[self.index].get_seq_length()
        buffers = routing.graphs.enter(routing, hidden_states, rotary, self.heads, tokens)
        if self.routing is not routing:
            self._prepare(routing, stored[self.index], buffers)
        if not self.storage.is_sliding:
            buffers.see(context["attention_mask"])
        entered = self._entered(buffers) if self.enters else Entered()
        whole, following = self._stretch(buffers, stored)
        asked = self.enters and self._attend(buffers, entered, context)
        buffers.entered, buffers.through = None, self.index
        if asked or self.always_adds or any(self.kept.values()) or whole or following:
            self._launch(buffers, entered, whole, following)
        if self.by_token:  # when the device has something to do
            self._note(dict(zip(self.layer.targets, self.told, strict=True)))
        for step in (self, *whole):
            buffers.through = step.index
            step._end()
        return buffers.hidden

    def _launch(
        self,
        buffers: Buffers,
        entered: Entered,
        whole: list[DecodeStep],
        following: DecodeStep | None,
    ) -> None:
        """What comes after the attention, the ``whole`` layers behind it, and what precedes the
        attention of the ``following`` one."""
        key: tuple = (self.index, "from", self.masked, *self.kept.items())
        if entered.factors or (self.masked and self.by_token):
            key += (id(entered),)  # which is read where it was recorded with it
        if whole:
            key += (len(whole), buffers.capacity)
        if following is not None:
            key += following._key(buffers)

        def function() -> Entered | None:
            self._finish(buffers, entered)
            for step in whole:
                step._finish(buffers, step._enter(buffers))
            return None if following is None else following._enter(buffers)

        made = self.routing.graphs.run(key, function, buffers)
        if following is not None:
            buffers.entered = buffers.state(following.index), made

    def _end(self) -> None:
        """Leave the forward call, whose cache is not kept alive."""
        if self.is_static:
            self.storage.count()
        if isinstance(self.storage, SequenceCacheLayer):
            self.storage.advance(1)
        self.routing = self.storage = None

    def _prepare(self, routing: Any, storage: Any, buffers: Buffers) -> None:
        """Get ready for a forward call: of sequences, what they keep is known then."""
        self.routing, self.storage = routing, storage
        if self.by_token:
            self.masked = buffers.batch > 1
            self.waits, self.attends = not self.masked, not self.layer.is_removed
        elif self.is_routed:
            check_batch(buffers.batch, cached=storage.batch)
            choices = storage.choices
            self.kept = {target: len(made.index) > 0 for target, made in choices.items()}
            self.masked = any(
                self.kept[target] and not made.is_everything for target, made in choices.items()
            )
            self.decided = routing.graphs.decided(self.index, choices)
            self._note({target: made.keep for target, made in choices.items()})
            self.attends = self.enters = self.kept.get(self.attention, True)
        self.is_static = (
            self.attends and not self.selects and buffers.make_static(self.index, self.storage)
        )

    def _is_led(self, buffers: Buffers) -> bool:
        """Whether the attention is in the graph of what precedes it."""
        return self.is_static and not self.waits and buffers.knows_mask

    def _key(self, buffers: Buffers) -> tuple:
        """Of what precedes the attention: all that it has in it beside weights."""
        layer, state = self.layer, ()
        if self.by_token:
            positions = (router.position for router in self.routers)
            state = (*layer.logit_borders.items(), *positions)
        capacity = buffers.capacity if self._is_led(buffers) else 0
        return (self.index, "to", self.attends, capacity, state)

    def _stretch(
        self, buffers: Buffers, stored: list[Any]
    ) -> tuple[list[DecodeStep], DecodeStep | None]:
        """The steps of the layers behind this one that can be done at once with it, and the one of
        which only what precedes the attention can be; ``stored``: the cache's layers."""
        whole: list[DecodeStep] = []
        is_observed = _has_hooks(self.layer)
        for layer in self.routing.graphs.layers[self.index + 1 :]:
            step = DecodeStep.of(layer, self.routing, buffers.batch)
            if step is None:
                break
            step._prepare(self.routing, stored[step.index], buffers)
            if not step.enters:
                break
            if is_observed or step.is_routed or not step._is_led(buffers) or _has_hooks(layer):
                return whole, step
            whole.append(step)
        return whole, None

    def _entered(self, buffers: Buffers) -> Entered:
        """What precedes the attention, unless the layer before has made it."""
        if buffers.entered and buffers.entered[0] == buffers.state(self.index):
            return buffers.entered[1]
        run = self.routing.graphs.run
        return run(self._key(buffers), lambda: self._enter(buffers), buffers)

    def _note(self, decisions: dict[str, Tensor]) -> None:
        for target, keep in decisions.items():
            self.routing.decisions[self.index, target] = keep

    def _enter(self, buffers: Buffers) -> Entered:
        """What precedes the attention, of a layer's input, and the attention where it is led."""
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
        if self._is_led(buffers):
            self._find_in_graph(buffers, entered)
            entered.is_attended = True
        return entered

    def _attend(self, buffers: Buffers, entered: Entered, context: dict[str, Any]) -> bool:
        """Whether any row asks; what it finds is in ``buffers.attended`` then."""
        if self.by_token:
            return self._attend_as_told(buffers, entered, context)
        if self.is_static:
            self._find_static(buffers, entered)
        elif self.attends:
            rows, mask = self._rows(), context["attention_mask"]
            projected: Any = entered.projected
            if rows is not None:
                projected = [heads.index_select(0, rows) for heads in projected]
                if mask is not None and len(mask) > 1:
                    mask = mask.index_select(0, rows)
            query, keys, values = projected
            keys, values = context[CACHE].update(keys, values, self.index)
            self._find(buffers, query, keys, values, mask, rows)
        return self.attends

    def _attend_as_told(self, buffers: Buffers, entered: Entered, context: dict[str, Any]) -> bool:
        """``_attend`` of a layer whose routers decide about tokens: what they say is waited for as
        late as possible, behind an attention that the device is busy with meanwhile."""
        storage, attends = self.storage, self.attends
        decided: Any = entered.decided
        answer = self.routing.graphs.answers.ask(decided) if self.waits else decided.clone
        mask = None if self.selects else context["attention_mask"]
        projected: Any = entered.projected or (None, None, None)
        query, keys, values = projected
        if is_done := self.is_static:
            self._find_static(buffers, entered)
        elif attends and not self.selects:
            keys, values = context[CACHE].update(keys, values, self.index)
            if is_done := self.attention is None or keys.nbytes <= AHEAD:
                self._find(buffers, query, keys, values, mask)
        self._hear(answer())
        if not attends:
            self.kept[self.attention] = False
        attends = self.kept.get(self.attention, True)
        if attends and self.selects:
            column = torch.zeros(1, dtype=torch.int64, device=query.device)
            keys, values, _ = storage.append(keys, values, column)
        if self.selects or self.layer.is_removed:
            storage.advance(1)
        if attends and not is_done:
            self._find(buffers, query, keys, values, mask)
        return attends

    def _find_static(self, buffers: Buffers, entered: Entered) -> None:
        """``_find``, among keys and values in the graphs' memory, unless that has been done."""
        if not entered.is_attended:
            key = (self.index, "attend", buffers.capacity, id(entered))
            self.routing.graphs.run(key, lambda: self._find_in_graph(buffers, entered), buffers)

    def _find_in_graph(self, buffers: Buffers, entered: Entered) -> None:
        """What ``_find_static`` records; the token's own key and value are among them."""
        projected: Any = entered.projected
        query, *more = projected
        keys, values = views = buffers.static[self.index].views
        for held, new in zip(views, more, strict=True):
            held.index_copy_(2, buffers.place, new)
        bias = buffers.bias[..., : buffers.capacity]
        found = attend_in_parts(query, keys, values, bias, self.scaling)
        buffers.attended.copy_(found)

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
            self.kept = {
                target: keep for target, [[keep]] in zip(targets, decided.tolist(), strict=True)
            }

    def _finish(self, buffers: Buffers, entered: Entered) -> None:
        """What comes after the attention."""
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


def _has_hooks(layer: nn.Module) -> bool:
    """Whether anybody may look at, or change, what a layer is given or returns."""
    hooks = (module._global_forward_hooks, module._global_forward_pre_hooks)
    return any((layer._forward_hooks, layer._forward_pre_hooks, *hooks))
