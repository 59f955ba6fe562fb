"""Decode steps as CUDA graphs: what the host would launch kernel by kernel, at once.

Where a step's time is the host's, nothing that a layer skips makes it shorter. Two graphs a layer,
recorded at the first step, leave the host little: what comes before the attention, and what comes
after it, of which there is one for each set of targets that may be kept. Between them keys and
values are stored, the attention, whose size grows, is computed as ever, and a router of tokens is
asked: of one sequence the host waits for the decision and launches what is kept; of several, whose
tokens share the weights that are read, everything is computed and ``y = x + m * F(x)`` is chosen
from. All graphs of a batch size work in the same memory, the residual stream in place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attention_mod import attend, project
from .cache_mod import CACHE, SequenceCacheLayer, TokenCacheLayer, check_batch


@dataclass
class Buffers:
    """Memory that graphs of one batch size read and write: the residual stream ``[B, 1, H]``, what
    the attention found ``[B, 1, heads * D]``, cosine and sine of the positions ``[B or 1, 1, D]``,
    and which tokens are no padding ``[B, 1]``."""

    hidden: Tensor
    attended: Tensor
    rotary: Sequence[Tensor]
    valid: Tensor
    filled_for: Any = None  # the call that positions and padding are of


@dataclass
class Entered:
    """What a layer's first graph leaves: queries, keys and values ``[B, heads, 1, D]`` (None: it
    has no use for them), the decisions of its routers of tokens ``[targets, B, 1]`` bool, and what
    exact ones multiply by, ``[B, 1, 1]`` of each target."""

    projected: list[Tensor] | None = None
    decided: Tensor | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)


class DecodingGraphs:
    """The graphs of a model's layers, and the memory that they share."""

    def __init__(self) -> None:
        self.buffers: dict[Hashable, Buffers] = {}
        self.recorded: dict[Hashable, tuple[Callable[[], None], Any]] = {}
        self.pool: Any = None

    @staticmethod
    def work_on(device: torch.device) -> bool:
        """Whether there are graphs on a device."""
        return device.type == "cuda"

    def enter(
        self, call: Any, hidden_states: Tensor, rotary: Sequence[Tensor], channels: int
    ) -> Buffers:
        """The buffers of a batch, which hold a layer's input ``[B, 1, H]`` now; ``call``: the
        forward call's ``RoutingCall``; ``channels``: of what the attention finds."""
        key = (*hidden_states.shape, *rotary[0].shape, hidden_states.dtype)
        if key not in self.buffers:
            with torch.inference_mode(False):
                self.buffers[key] = Buffers(
                    torch.empty_like(hidden_states, requires_grad=False),
                    hidden_states.new_zeros(*hidden_states.shape[:2], channels),
                    [torch.empty_like(table, requires_grad=False) for table in rotary],
                    torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=rotary[0].device),
                )
        buffers = self.buffers[key]
        if buffers.filled_for is not call:
            for own, table in zip(buffers.rotary, rotary, strict=True):
                own.copy_(table)
            valid = call.valid(1)
            buffers.valid.fill_(True) if valid is None else buffers.valid.copy_(valid)
            buffers.filled_for = call
        if hidden_states is not buffers.hidden:
            buffers.hidden.copy_(hidden_states)
        return buffers

    def run(self, key: tuple, function: Callable[[], Any], buffers: Buffers) -> Any:
        """``function()``, whose work is recorded when ``key`` is first met and repeated later; what
        it returns is its own memory, which the next call of the same key overwrites."""
        key = (*key, id(buffers))
        if key not in self.recorded:
            before = buffers.hidden.clone()
            self.recorded[key] = self._record(function, lambda: buffers.hidden.copy_(before))
        repeat, result = self.recorded[key]
        repeat()
        return result

    def _record(
        self, function: Callable[[], Any], restore: Callable[[], Any]
    ) -> tuple[Callable[[], None], Any]:
        """What repeats ``function``, and its result; ``restore`` undoes a call of it."""
        if self.pool is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            function()  # what libraries make at their first use does not belong into a graph
        here.wait_stream(self.stream)
        restore()
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool)  # torch.cuda.graph would empty the cache each time
            try:
                result = function()
            finally:
                graph.capture_end()
        here.wait_stream(self.stream)
        return graph.replay, result


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

    def run(self, hidden_states: Tensor) -> Tensor | None:
        """The layer's output, in memory that the next layer may change; None: the rows would go
        different ways, each in its own graph."""
        layer, batch = self.layer, len(hidden_states)
        if self.by_token and layer.stores_selected and batch > 1:
            return None
        if isinstance(self.storage, SequenceCacheLayer) and not self._all_alike(batch):
            return None
        self.masked = self.by_token and batch > 1
        attends = not layer.is_removed if self.by_token else self.kept.get(self.attention, True)
        rotary, channels = self.context["position_embeddings"], layer.self_attn.o_proj.in_features
        buffers = self.routing.graphs.enter(self.routing, hidden_states, rotary, channels)
        entered = Entered()
        if self.by_token or attends:
            entered = self._graph(
                buffers, "enter", (attends,), lambda: self._enter(buffers, attends)
            )
        found = self._attend(entered, attends) if self.by_token or attends else None
        if found is not None:
            buffers.attended.copy_(found)
        if found is not None or any(self.kept.values()) or self._adds_to_what_is_skipped():
            what = tuple(self.kept.items())
            self._graph(buffers, "rest", what, lambda: self._rest(buffers, entered))
        if isinstance(self.storage, SequenceCacheLayer):
            self.storage.advance(1)
        return buffers.hidden

    def _graph(self, buffers: Buffers, name: str, what: tuple, function: Callable[[], Any]) -> Any:
        """One of the layer's; in its key, all that it has in it beside weights."""
        layer, state = self.layer, ()
        if layer.router is not None:
            positions = (router.position for router in layer.routers)
            state = (*layer.logit_borders.items(), *positions)
        return self.routing.graphs.run((layer.layer_idx, name, what, state), function, buffers)

    def _all_alike(self, batch: int) -> bool:
        """Whether the sequences go one way, by what was decided at their prefill."""
        check_batch(batch, cached=self.storage.batch)
        choices = self.storage.choices.items()
        self.kept = {target: len(made.index) > 0 for target, made in choices}
        if any(self.kept[target] and not made.is_everything for target, made in choices):
            return False
        self._note({target: made.keep for target, made in choices})
        return True

    def _note(self, decisions: dict[str, Tensor]) -> None:
        for target, keep in decisions.items():
            self.routing.decisions[self.layer.layer_idx, target] = keep

    def _adds_to_what_is_skipped(self) -> bool:
        """Whether a layer that keeps nothing changes its input."""
        return self.layer.stand_in is not None or not {"mlp", "block"} & set(self.layer.targets)

    def _enter(self, buffers: Buffers, attends: bool) -> Entered:
        """What comes before the attention, of a layer's input."""
        layer, entered = self.layer, Entered()
        normed = layer.input_layernorm(buffers.hidden)
        if attends:
            positions = {"q": buffers.rotary, "k": buffers.rotary, "v": None}
            entered.projected = [
                project(layer.self_attn, name, normed, rotary).transpose(1, 2)
                for name, rotary in positions.items()
            ]
        if self.by_token:
            decided = []
            for target in layer.targets:
                logits, causal = layer.ask_tokens(target, normed)
                decided.append((causal >= layer.logit_borders[target]) & buffers.valid)
                if layer.capacities is not None:
                    entered.factors[target] = logits.to(normed.dtype)[..., None]
            entered.decided = torch.stack(decided)
        return entered

    def _attend(self, entered: Entered, attends: bool) -> Tensor | None:
        """What the tokens find ``[B, 1, heads * D]`` (None: they do not ask), keys and values being
        stored; tokens' decisions are asked for on the way, as late as possible."""
        layer, storage = self.layer, self.storage
        selected = isinstance(storage, TokenCacheLayer)
        projected: Sequence[Any] = entered.projected or (None, None, None)
        query, keys, values = projected
        if attends and not selected:
            keys, values = self.context[CACHE].update(keys, values, layer.layer_idx)
        if entered.decided is not None:
            self._ask(entered.decided)
            if not attends:
                self.kept[self.attention] = False
            attends = self.kept.get(self.attention, True)
            if attends and selected:
                column = torch.zeros(1, dtype=torch.int64, device=query.device)
                keys, values, _ = storage.append(keys, values, column)
            if selected or layer.is_removed:
                storage.advance(1)
        if not attends:
            return None
        mask = None if selected else self.context["attention_mask"]
        return attend(layer.self_attn, query, keys, values, mask, is_causal=False)

    def _ask(self, decided: Tensor) -> None:
        """Note the decisions ``[targets, B, 1]`` of the layer's routers of tokens, and what is
        kept: of one sequence the host waits for it, of several everything is computed."""
        targets = self.layer.targets
        self.kept = dict.fromkeys(targets, True)
        if self.masked:
            decided = decided.clone()  # the next step overwrites it
        else:
            decided = decided.to("cpu", copy=True)
            self.kept = dict(zip(targets, decided.flatten().tolist(), strict=True))
        self._note(dict(zip(targets, decided, strict=True)))

    def _rest(self, buffers: Buffers, entered: Entered) -> None:
        """What comes after the attention."""
        layer, x = self.layer, buffers.hidden

        def attention(factor: Tensor | None) -> Tensor:
            return _added(x, layer.self_attn.o_proj(buffers.attended), factor)

        def feed(factor: Tensor | None) -> Tensor:
            return _added(x, layer.mlp(layer.post_attention_layernorm(x)), factor)

        def block(factor: Tensor | None) -> Tensor:
            first = layer.self_attn.o_proj(buffers.attended)
            second = layer.mlp(layer.post_attention_layernorm(x + first))
            if factor is None:
                return x + first + second
            return x + factor * (first + second)

        if "block" in self.kept:
            x = self._mixed("block", x, block, layer.input_layernorm, entered)
        else:
            x = self._mixed("attn", x, attention, layer.input_layernorm, entered)
            x = self._mixed("mlp", x, feed, layer.post_attention_layernorm, entered)
        buffers.hidden.copy_(x)

    def _mixed(
        self,
        target: str,
        x: Tensor,
        full: Callable[[Tensor | None], Tensor],
        norm: nn.Module,
        entered: Entered,
    ) -> Tensor:
        """``full`` of the rows that keep the target, and ``x`` with the stand-in, if there is any,
        of those that skip it."""
        layer = self.layer
        if target not in self.kept:
            return full(None)
        skipped = x
        if layer.stand_in is not None and (self.masked or not self.kept[target]):
            skipped = x + layer._own(layer.stand_in, target)(norm(x))
        if not self.kept[target]:
            return skipped
        computed = full(entered.factors.get(target))
        if entered.decided is None or not self.masked:
            return computed
        keep = entered.decided[layer.targets.index(target)]
        return torch.where(keep[..., None], computed, skipped)


def _added(x: Tensor, update: Tensor, factor: Tensor | None) -> Tensor:
    return x + (update if factor is None else factor * update)
