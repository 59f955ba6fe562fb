"""The decoder layer that asks a router what to compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import eager_attention_forward

from .attention_mod import attend, attend_at_places, project
from .cache_mod import (
    CACHE,
    Choice,
    SequenceCacheLayer,
    TokenCacheLayer,
    TokenSelection,
    check_batch,
)
from .configuration_mod import RoutedConfig
from .graph_mod import DecodingGraphs
from .kernels_mod import MASKED
from .step_mod import DecodeStep
from .thresholds_mod import CapacityBorders, WatchedBorders, logit_border

KNOTS = 5  # budgets of a range, evenly spaced, that a router has borders for


@dataclass
class RoutingCall:
    """What the layers of one forward call share about routing, and what they report back."""

    pooled: Tensor | None  # [B, S]: tokens a sequence's decision may see; None: all
    tokens: Tensor | None  # [B, past + S]: tokens that are no padding; None: all
    borders: CapacityBorders | WatchedBorders | None = None  # found, or given, on the way
    top_k: bool = False  # keep the tokens of the largest logits, of the whole text; not causal
    graphs: DecodingGraphs | None = None  # by which this decode step is computed
    # of each router, by layer and target: [B] or [B, S] bool, of experts' routers [B, S, top_k]
    decisions: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    # of each router, with ``top_k``: how many tokens the causal rule would decide about alike
    agreed: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    # of each layer whose experts are chosen among, by its index: assigned and executed tokens of
    # each expert, [2, E], no-op experts behind
    experts: dict[int, Tensor] = field(default_factory=dict)

    @property
    def by_thresholds(self) -> bool:
        """Whether the routers' own thresholds decide."""
        return self.borders is None and not self.top_k

    def valid(self, length: int) -> Tensor | None:
        """Of the call's own tokens ``[B, S]``, those that are no padding; None: all."""
        return None if self.tokens is None else self.tokens[:, -length:]


class Router(nn.Module):
    """One affine map ``H -> 1``, or of a layer's ``E`` experts ``H -> E``, computed in fp32."""

    def __init__(
        self,
        hidden_size: int,
        bias: bool,
        position: float | None = None,
        experts: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts or 1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(experts or 1)) if bias else None
        self.experts = experts
        self.position = position  # in the range of budgets that it serves; None: there is none
        if position is not None:
            self.work_weight = nn.Parameter(torch.zeros(1, hidden_size))
            self.borders = nn.Parameter(torch.zeros(KNOTS))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[...]`` (of experts ``[..., E]``) of hidden states ``[..., H]``."""
        weight, bias = self.weight.float(), None if self.bias is None else self.bias.float()
        if self.position is not None:
            at = self.position * (KNOTS - 1)
            first = min(int(at), KNOTS - 2)
            weight = torch.lerp(weight, weight + self.work_weight.float(), self.position)
            borders = self.borders.float()
            bias = bias + torch.lerp(borders[first], borders[first + 1], at - first)
        logits = nn.functional.linear(hidden_states.float(), weight, bias)
        return logits.squeeze(-1) if self.experts is None else logits


class Predictor(nn.Module):
    """What tells, without the rest of the text, whether a token is among the largest: two linear
    maps, computed in fp32."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, size)
        self.out = nn.Linear(size, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[...]`` of hidden states ``[..., H]``."""
        found = nn.functional.silu(_in_fp32(self.hidden, hidden_states))
        return _in_fp32(self.out, found).squeeze(-1)


def _in_fp32(linear: nn.Linear, values: Tensor) -> Tensor:
    return nn.functional.linear(values.float(), linear.weight.float(), linear.bias.float())


class StandIn(nn.Module):
    """What a skipped unit adds: ``B A x + b`` of rank ``r``, of what the router reads (of an MLP:
    of what the MLP reads)."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[..., H]`` to the same."""
        return self.up(self.down(hidden_states))


class RoutedLayer:
    """Mixed into a family's decoder layer: what its routers skip is not computed.

    Of the family it uses ``input_layernorm``, ``self_attn``, ``post_attention_layernorm`` and
    ``mlp``, each added to the residual stream as it is.
    """

    def __init__(self, config: RoutedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for name in ("input_layernorm", "post_attention_layernorm"):
            # As the family's, which is eight kernels on a GPU.
            setattr(self, name, nn.RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.layer_idx = layer_idx
        self.router = None
        if layer_idx in config.routing["layers"]:
            hidden_size, rank = config.hidden_size, config.routing.get("stand_in_rank")
            self.targets, self.per_sequence = config.targets, config.per_sequence
            self.router = self._of_each(lambda: self._make_router(config))
            self.stand_in = self._of_each(lambda: StandIn(hidden_size, rank)) if rank else None
            size, self.capacities = config.routing.get("predictor_size"), None
            self.predictor = self._of_each(lambda: Predictor(hidden_size, size)) if size else None
            if config.is_exact:
                self.capacities = config.capacities()
            self.set_thresholds(config.thresholds())
            self.attention_target = config.attention_target
            self.stores_selected = config.stores_selected
            self.window = config.window(layer_idx)

    def _make_router(self, config: RoutedConfig) -> Router | None:
        bias = config.routing.get("bias", False)
        return Router(config.hidden_size, bias, config.work_position())

    def _of_each(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A module for the one target, or one for each in a dict of them."""
        if len(self.targets) == 1:
            return make()
        return nn.ModuleDict({target: make() for target in self.targets})

    def set_thresholds(self, thresholds: dict[tuple[int, str], float]) -> None:
        """Take on this layer's of all routers' thresholds."""
        self.logit_borders = {
            target: logit_border(threshold)
            for (layer, target), threshold in thresholds.items()
            if layer == self.layer_idx
        }

    def set_position(self, position: float) -> None:
        """Tell the layer's routers which budget of their range it is."""
        for router in self.routers:
            router.position = position

    @property
    def routers(self) -> list[Router]:
        """The layer's, in the order of its targets."""
        return [] if self.router is None else [self._own(self.router, t) for t in self.targets]

    @property
    def is_removed(self) -> bool:
        """Whether no unit will ever go through the attention."""
        return self.logit_borders.get(self.attention_target) == math.inf

    def forward(self, hidden_states: Tensor, *, routing: RoutingCall, **context: Any) -> Tensor:
        """``[B, S, H]`` to the same; ``context`` is what the family's layer takes."""
        if routing.graphs is not None:
            if routing.graphs.is_through(routing, self.layer_idx):
                return hidden_states
            step = DecodeStep.of(self, routing, hidden_states.shape[0])
            if step is not None:
                return step.run(hidden_states, routing, context)
        if self.router is None:
            return self._unrouted(hidden_states, context)
        route = self._by_sequence if self.per_sequence else self._by_token
        return route(hidden_states, routing, context)

    def _unrouted(self, hidden_states: Tensor, context: dict[str, Any]) -> Tensor:
        return super().forward(hidden_states, **context)

    def _by_sequence(self, hidden_states: Tensor, routing: RoutingCall, context: dict) -> Tensor:
        cache = context[CACHE]
        storage = SequenceCacheLayer() if cache is None else cache.layers[self.layer_idx]
        batch, length, _ = hidden_states.shape
        normed = None
        if storage.batch is None:
            normed = self.input_layernorm(hidden_states)
            keep = {each: self._sequences_to_keep(each, normed, routing) for each in self.targets}
            storage.decide(keep)
        check_batch(batch, cached=storage.batch)
        for target, made in storage.choices.items():
            routing.decisions[self.layer_idx, target] = made.keep
        choice = storage.choices.get(self.attention_target)

        def attend(kept: Tensor) -> Tensor:
            everyone = len(kept) == batch
            if normed is None:
                inputs = self.input_layernorm(kept)
            else:
                inputs = normed if everyone else normed[choice.index]
            chosen = context if everyone else _select(context, choice.index, batch)
            return kept + self.self_attn(hidden_states=inputs, **chosen)[0]

        def finish(kept: Tensor) -> Tensor:
            kept = attend(kept)
            return self._mlp(kept) if "block" in self.targets else kept

        def stand_in(skipped: Tensor) -> Tensor:
            read = self.input_layernorm(skipped) if normed is None else choice.left(normed)
            return skipped + self._own(self.stand_in, self.attention_target)(read)

        if choice:
            hidden_states = choice.apply(hidden_states, finish, self._instead(stand_in))
        else:
            hidden_states = attend(hidden_states)
        if "block" not in self.targets:
            hidden_states = self._feed_forward(hidden_states, storage.choices.get("mlp"))
        storage.advance(length)
        return hidden_states

    def _by_token(self, hidden_states: Tensor, routing: RoutingCall, context: dict) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        choices: dict[str, TokenSelection] = {}
        for target in self.targets:
            choices[target] = self._choose_tokens(target, normed, routing)
            routing.decisions[self.layer_idx, target] = choices[target].keep
        kept = choices.get(self.attention_target)
        if kept is None or (not kept.is_late and not self.stores_selected and kept.is_everything):
            hidden_states = hidden_states + self.self_attn(hidden_states=normed, **context)[0]
            return self._feed_forward(hidden_states, choices.get("mlp"))
        update = self._attend_tokens(normed, kept, routing, context)

        def finish(tokens: Tensor) -> Tensor:
            if "block" not in self.targets:
                return tokens + kept.multiply(update)
            if kept.factors is None:
                return self._mlp(tokens + update)
            return tokens + kept.multiply(update + self._mlp_update(tokens + update))

        def stand_in(skipped: Tensor) -> Tensor:
            own = self._own(self.stand_in, self.attention_target)
            return skipped + own(kept.left(normed.flatten(0, 1)))

        tokens = kept.apply(hidden_states.flatten(0, 1), finish, self._instead(stand_in))
        hidden_states = tokens.view_as(normed)
        if "block" in self.targets:
            return hidden_states
        return self._feed_forward(hidden_states, choices.get("mlp"))

    def _own(self, modules: nn.Module, target: str) -> nn.Module:
        """A target's among what ``_of_each`` made."""
        return modules if len(self.targets) == 1 else modules[target]

    def _instead(self, stand_in: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor] | None:
        """What becomes of skipped units; None: they stay."""
        return stand_in if self.stand_in else None

    def _feed_forward(self, hidden_states: Tensor, choice: Choice | None) -> Tensor:
        """The MLP of the chosen units of ``[B, S, H]``, sequences or tokens; None: of all."""
        if choice is None:
            return self._mlp(hidden_states)
        if not isinstance(choice, TokenSelection):
            return choice.apply(hidden_states, self._mlp, self._instead(self._mlp_stand_in))

        def finish(tokens: Tensor) -> Tensor:
            return tokens + choice.multiply(self._mlp_update(tokens))

        tokens = hidden_states.flatten(0, 1)
        tokens = choice.apply(tokens, finish, self._instead(self._mlp_stand_in))
        return tokens.view_as(hidden_states)

    def _mlp(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self._mlp_update(hidden_states)

    def _mlp_update(self, hidden_states: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(hidden_states))

    def _mlp_stand_in(self, hidden_states: Tensor) -> Tensor:
        own = self._own(self.stand_in, "mlp")
        return hidden_states + own(self.post_attention_layernorm(hidden_states))

    def _sequences_to_keep(self, target: str, normed: Tensor, routing: RoutingCall) -> Tensor:
        """``[B]`` bool: the mean logit of the pooled tokens reaches the border."""
        logits = self._own(self.router, target)(normed)
        if routing.pooled is None:
            logits = logits.mean(1)
        else:
            logits = (logits * routing.pooled).sum(1) / routing.pooled.sum(1).clamp(min=1)
        return logits >= self._border(target, logits, routing)

    def _choose_tokens(self, target: str, normed: Tensor, routing: RoutingCall) -> TokenSelection:
        """Of normed hidden states ``[B, S, H]``, those whose logits reach the border, or with
        ``top_k`` the exact router's number of the largest."""
        logits, causal = self.ask_tokens(target, normed)
        if self.capacities is None:
            return TokenSelection(self._tokens_to_keep(target, logits, routing))
        keep = self._tokens_to_keep(target, causal, routing)
        if routing.top_k:
            place, valid = (self.layer_idx, target), routing.valid(logits.shape[1])
            largest = largest_tokens(logits, self.capacities[place], valid)
            alike = largest == keep
            routing.agreed[place] = (alike if valid is None else alike & valid).sum()
            keep = largest
        return TokenSelection(keep, logits.to(normed.dtype))

    def ask_tokens(self, target: str, normed: Tensor) -> tuple[Tensor, Tensor]:
        """A router's logits of normed hidden states ``[B, S, H]``, and those by which a token may
        be chosen before the next is known: a predictor's, if the router has one."""
        logits = self._own(self.router, target)(normed)
        if self.predictor is None:
            return logits, logits
        return logits, self._own(self.predictor, target)(normed)

    def _tokens_to_keep(self, target: str, logits: Tensor, routing: RoutingCall) -> Tensor:
        """``[B, S, ...]`` bool as the logits: these reach the border, and the token is real."""
        valid = routing.valid(logits.shape[1])
        if valid is None:
            return logits >= self._border(target, logits.flatten(), routing)
        border = self.logit_borders[target]
        if routing.borders:
            border = self._border(target, logits[valid].flatten(), routing)
        return (logits >= border) & valid.view(*valid.shape, *[1] * (logits.dim() - 2))

    def _border(self, target: str, logits: Tensor, routing: RoutingCall) -> float:
        """The logit from which on a router keeps, or the one that these ``[N]`` ask for."""
        if routing.borders is None:
            return self.logit_borders[target]
        return routing.borders.find((self.layer_idx, target), logits)

    def _attend_tokens(
        self, normed: Tensor, kept: TokenSelection, routing: RoutingCall, context: dict
    ) -> Tensor:
        """The attention's update ``[N, H]`` of the kept tokens, from all normed ones."""
        attn, cache = self.self_attn, context[CACHE]
        batch, length, _ = normed.shape
        if self.is_removed and routing.by_thresholds:  # nobody will ever read its keys
            if cache is not None:
                cache.layers[self.layer_idx].advance(length)
            return kept.take(normed)
        past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        rotary, slots = context["position_embeddings"], None
        if not self.stores_selected:  # before it is known whose queries there are
            keys = project(attn, "k", normed, rotary).transpose(1, 2)
            values = project(attn, "v", normed).transpose(1, 2)
            if cache is not None:
                keys, values = cache.update(keys, values, self.layer_idx)
            plain = length == 1 and context["attention_mask"] is None
        chosen, chosen_rotary = kept.take(normed), [kept.take(t) for t in rotary]
        if self.stores_selected:
            storage = TokenCacheLayer() if cache is None else cache.layers[self.layer_idx]
            if len(kept.index) or not storage.is_initialized:
                keys = project(attn, "k", chosen, chosen_rotary)
                keys, values, slots = storage.store(keys, project(attn, "v", chosen), kept)
            storage.advance(length)
            plain = batch == length == 1 or not (past or self.window)
        if not len(kept.index):
            return chosen
        query = project(attn, "q", chosen, chosen_rotary)
        eager, visible = attn.config._attn_implementation == "eager", None
        all_keys = slots is None and not (past or self.window) and routing.tokens is None
        if all_keys and not (eager or plain) and self._is_quick_among_keys(query, kept):
            grid = query.new_zeros(batch * length, *query.shape[1:])
            grid = grid.index_copy_(0, kept.index, query).unflatten(0, (batch, length))
            grid = grid.transpose(1, 2)
            attended = attend_at_places(attn, grid, keys, values, None, is_causal=True)
            return attn.o_proj(kept.take(attended))
        query = kept.pad(query).transpose(1, 2)
        if eager or not plain:  # else all keys are seen, or by place all up to the query's own
            if slots is None:
                slots = torch.arange(past + length, device=normed.device)[-keys.shape[2] :]
                slots = slots.expand(batch, -1)
            visible = self._visible(kept.pad(past + kept.columns), slots, routing)
        if eager:
            hidden = visible.logical_not().to(query.dtype) * torch.finfo(query.dtype).min
            attended, _ = eager_attention_forward(
                attn, query, keys, values, hidden, scaling=attn.head_dim**-0.5
            )
            attended = attended.flatten(2)
        else:  # flash attention knows no choice of queries among the keys
            attended = attend(attn, query, keys, values, visible)
        return attn.o_proj(kept.unpad(attended))

    def _is_quick_among_keys(self, query: Tensor, kept: TokenSelection) -> bool:
        """Whether chosen queries ``[N, heads, D]`` are better off at their places among all, zeros
        elsewhere, than with a mask: GPUs have fast kernels for what is causal, none for masks."""
        return query.is_cuda and len(kept.index) >= MASKED * kept.keep.numel()

    def _visible(self, queries: Tensor, slots: Tensor, routing: RoutingCall) -> Tensor:
        """``[B, 1, Q, K]`` bool: which stored keys each query sees, by both's slots in the text."""
        distance = queries[:, :, None] - slots[:, None, :]
        visible = (distance >= 0) & (slots >= 0)[:, None]
        if self.window:
            visible &= distance < self.window
        if routing.tokens is not None and not self.stores_selected:
            visible &= routing.tokens[:, None, -slots.shape[1] :]
        return visible[:, None]


def largest_tokens(logits: Tensor, capacity: float, valid: Tensor | None) -> Tensor:
    """``[B, S]`` bool: of each row's ``n`` ``valid`` tokens (None: all) the
    ``floor(capacity * n + 0.5)`` with the largest logits ``[B, S]``; of equal ones the first."""
    if valid is None:
        valid = torch.ones_like(logits, dtype=torch.bool)
    wanted = (capacity * valid.sum(1, keepdim=True).double() + 0.5).floor()
    order = logits.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < wanted) & valid


def _select(value: Any, rows: Tensor, batch: int) -> Any:
    """The kept rows of every tensor with a batch dim in a layer's context; the rest as it is."""
    if isinstance(value, dict):
        return {name: _select(item, rows, batch) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_select(item, rows, batch) for item in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch:
        return value[rows]
    return value
