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

from collections.abc import Callable, Hashable
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
    rotary: tuple[Tensor, Tensor]
    valid: Tensor
    filled_for: Any = None  # the call that positions and padding are of


@dataclass
class Entered:
    """What a layer's first graph leaves: queries, keys and values ``[B, heads, 1, D]`` (None: it
    has no use for them), the decisions of its routers of tokens ``[targets, B, 1]`` bool, and what
    exact ones multiply by, ``[B, 1, 1]`` of each target."""

    projected: tuple[Tensor, Tensor, Tensor] | None = None
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
        self, call: Any, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], channels: int
    ) -> Buffers:
        """The buffers of a batch, which hold a layer's input ``[B, 1, H]`` now; ``call``: the
        forward call's ``RoutingCall``; ``channels``: of what the attention finds."""
        key = (*hidden_states.shape, *rotary[0].shape, hidden_states.dtype)
        if key not in self.buffers:
            with torch.inference_mode(False):
                self.buffers[key] = Buffers(
                    torch.empty_like(hidden_states, requires_grad=False),
                    hidden_states.new_zeros(*hidden_states.shape[:2], channels),
                    tuple(torch.empty_like(table, requires_grad=False) for table in rotary),
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

    def run(self, key: Hashable, function: Callable[[], Any], buffers: Buffers) -> Any:
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


class GraphedDecoding:
    """Mixed into a routed layer: its decode steps by graphs."""

    def decode(self, hidden_states: Tensor, routing: Any, context: dict[str, Any]) -> Tensor | None:
        """A layer's output of single tokens ``[B, 1, H]``, in memory that the next layer may
        change; None: the rows would go different ways, each in its own graph."""
        cache, batch = context[CACHE], len(hidden_states)
        storage, attn = cache.layers[self.layer_idx], self.self_attn
        kept: dict[str, bool] = {}
        by_token = self.router is not None and not self.per_sequence
        if by_token and self.stores_selected and batch > 1:
            return None
        if isinstance(storage, SequenceCacheLayer):
            check_batch(batch, cached=storage.batch)
            kept = {target: len(made.index) > 0 for target, made in storage.choices.items()}
            if any(kept[target] and not c.is_everything for target, c in storage.choices.items()):
                return None
            for target, made in storage.choices.items():
                routing.decisions[self.layer_idx, target] = made.keep
        attention = self.attention_target if self.router is not None else None
        may_attend = not self.is_removed if by_token else kept.get(attention, True)
        channels = attn.o_proj.in_features
        buffers = routing.graphs.enter(
            routing, hidden_states, context["position_embeddings"], channels
        )
        state = self._state_of_graphs()
        entered = Entered()
        if by_token or may_attend:
            entered = routing.graphs.run(
                (self.layer_idx, "enter", may_attend, state),
                lambda: self._enter(buffers, by_token, may_attend),
                buffers,
            )
        keys = values = None
        if may_attend and not isinstance(storage, TokenCacheLayer):
            keys, values = cache.update(*entered.projected[1:], self.layer_idx)
        if by_token:
            decided = entered.decided
            kept = dict.fromkeys(self.targets, True)
            if batch == 1:  # the one wait
                decided = decided.to("cpu", copy=True)
                kept = dict(zip(self.targets, decided.flatten().tolist(), strict=True))
            else:
                decided = decided.clone()  # which the next step would overwrite
            for target, keep in zip(self.targets, decided, strict=True):
                routing.decisions[self.layer_idx, target] = keep
            if not may_attend:
                kept[attention] = False
                storage.advance(1)
            elif isinstance(storage, TokenCacheLayer):
                if kept[attention]:
                    column = torch.zeros(1, dtype=torch.int64, device=hidden_states.device)
                    keys, values, _ = storage.append(*entered.projected[1:], column)
                storage.advance(1)
        attends = may_attend and kept.get(attention, True)
        if attends:
            mask = None if isinstance(storage, TokenCacheLayer) else context["attention_mask"]
            found = attend(attn, entered.projected[0], keys, values, mask, is_causal=False)
            buffers.attended.copy_(found)
        if attends or any(kept.values()) or self._adds_to_what_is_skipped():
            routing.graphs.run(
                (self.layer_idx, "rest", *kept.items(), state),
                lambda: self._rest(buffers, kept, entered, masked=by_token and batch > 1),
                buffers,
            )
        if isinstance(storage, SequenceCacheLayer):
            storage.advance(1)
        return buffers.hidden

    def _state_of_graphs(self) -> tuple:
        """What graphs have in them beside weights, and may be set anew."""
        if self.router is None:
            return ()
        routers = [self.router] if len(self.targets) == 1 else self.router.values()
        return (*self.logit_borders.items(), *(router.position for router in routers))

    def _adds_to_what_is_skipped(self) -> bool:
        """Whether a layer that keeps nothing changes its input."""
        return self.stand_in is not None or not {"mlp", "block"} & set(self.targets)

    def _enter(self, buffers: Buffers, by_token: bool, attends: bool) -> Entered:
        """What comes before the attention, of a layer's input."""
        normed = self.input_layernorm(buffers.hidden)
        entered = Entered()
        if attends:
            entered.projected = tuple(
                project(self.self_attn, name, normed, rotary).transpose(1, 2)
                for name, rotary in (("q", buffers.rotary), ("k", buffers.rotary), ("v", None))
            )
        if by_token:
            decided = []
            for target in self.targets:
                logits, causal = self.ask_tokens(target, normed)
                decided.append((causal >= self.logit_borders[target]) & buffers.valid)
                if self.capacities is not None:
                    entered.factors[target] = logits.to(normed.dtype)[..., None]
            entered.decided = torch.stack(decided)
        return entered

    def _rest(
        self, buffers: Buffers, kept: dict[str, bool], entered: Entered, *, masked: bool
    ) -> None:
        """What comes after the attention; ``masked``: of the kept targets the decisions choose."""

        def add(
            target: str, x: Tensor, full: Callable[[Tensor | None], Tensor], norm: nn.Module
        ) -> Tensor:
            if target not in kept:
                return full(None)
            skipped = x
            if self.stand_in is not None and (masked or not kept[target]):
                skipped = x + self._own(self.stand_in, target)(norm(x))
            if not kept[target]:
                return skipped
            computed = full(entered.factors.get(target))
            if not masked:
                return computed
            keep = entered.decided[self.targets.index(target)]
            return torch.where(keep[..., None], computed, skipped)

        def block(factor: Tensor | None) -> Tensor:
            update = self.self_attn.o_proj(buffers.attended)
            if factor is None:
                return self._mlp(x + update)
            return x + factor * (update + self._mlp_update(x + update))

        def attention(factor: Tensor | None) -> Tensor:
            update = self.self_attn.o_proj(buffers.attended)
            return x + (update if factor is None else factor * update)

        def feed(factor: Tensor | None) -> Tensor:
            update = self._mlp_update(x)
            return x + (update if factor is None else factor * update)

        x = buffers.hidden
        if "block" in kept:
            x = add("block", x, block, self.input_layernorm)
        else:
            x = add("attn", x, attention, self.input_layernorm)
            x = add("mlp", x, feed, self.post_attention_layernorm)
        buffers.hidden.copy_(x)
