"""Causal language models with Mixture-of-Depths routers, for Transformers 4.57 and 5.x.

This file travels with an exported model and needs only ``torch`` and ``transformers``::

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A routed layer's router reads the output of the input norm and decides what is computed:
``y = x + m * F(x)``, F = the attention, the MLP or both (``attn``, ``mlp``, ``block``), m one
number per sequence or per token (``attn_sequence``, ``attn_token``, ...). What is skipped is
not computed.

- A sequence's decision is made once, at prefill, and lives in the cache, so that it follows
  reordering, repetition and cropping. Sequences that skip an attention store nothing there.
- A token's decision is its own, at decode steps too. With ``keys_values: selected`` a token
  that skips an attention stores nothing there either; with ``all`` it still offers its key
  and value to others.

From top to bottom: configuration, caches, the routed layer, model, generation, families.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    eager_attention_forward,
    rotate_half,
)
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

# ---------------------------------------------------------------- configuration

GRANULARITIES = tuple(f"{t}_{u}" for t in ("attn", "mlp", "block") for u in ("sequence", "token"))
NO_ROUTING = {"granularity": "attn_sequence", "layers": [], "threshold": 0.5}


class RoutedConfig:
    """What a family's configuration gains: a ``routing`` entry.

    ``granularity`` (one of ``GRANULARITIES``), ``layers`` (zero-based indices of the routed
    layers), ``threshold`` (keep when ``sigmoid(logit)`` reaches it: a number, or one per routed
    layer; 0 keeps and 1 skips everything), ``keys_values`` (``all`` or ``selected``; for
    ``attn_token`` and ``block_token``), and what the routers were trained for.
    """

    routing: dict[str, Any]

    def check_routing(self) -> None:
        """Raise ``ValueError`` for a ``routing`` entry this file cannot run."""
        routing = self.routing
        granularity, layers = routing["granularity"], routing["layers"]
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"routing.granularity = {granularity!r}: must be one of {', '.join(GRANULARITIES)}."
            )
        if any(not 0 <= layer < self.num_hidden_layers for layer in layers):
            raise ValueError(
                f"routing.layers = {layers}: must be from 0 to {self.num_hidden_layers - 1}."
            )
        selects = granularity in ("attn_token", "block_token")
        allowed = ("all", "selected") if selects else (None,)
        if routing.get("keys_values", allowed[0]) not in allowed:
            raise ValueError(
                f"routing.keys_values = {routing['keys_values']!r}: must be "
                f"{' or '.join(map(repr, allowed))} with granularity {granularity!r}."
            )
        self.thresholds()

    def thresholds(self) -> dict[int, float]:
        """Each routed layer's threshold."""
        layers, threshold = self.routing["layers"], self.routing["threshold"]
        values = threshold if isinstance(threshold, list) else [threshold] * len(layers)
        if len(values) != len(layers) or any(not 0.0 <= value <= 1.0 for value in values):
            raise ValueError(
                f"routing.threshold = {threshold}: must be a number from 0 to 1, or a list of one "
                f"per routed layer ({len(layers)})."
            )
        return dict(zip(layers, values, strict=True))

    def window(self, layer: int) -> int | None:
        """How many tokens back a layer's attention sees, itself included; None: all of them."""
        kinds = getattr(self, "layer_types", None)
        if kinds and kinds[layer] != "sliding_attention":
            return None
        return getattr(self, "sliding_window", None)


def logit_border(threshold: float) -> float:
    """The logit whose sigmoid is ``threshold``: ``log(t / (1 - t))``."""
    if threshold in (0.0, 1.0):
        return math.inf if threshold else -math.inf
    return math.log(threshold / (1.0 - threshold))


# ------------------------------------------------------------------------ caches


class RoutedCacheLayer(DynamicLayer):
    """A layer's keys and values where not everything is stored; knows how long the text is."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.seen = 0  # tokens every sequence has been through, stored or not

    @property
    def first_visible(self) -> int:
        """The slot of the oldest token that the next one sees."""
        return max(self.seen - self.window + 1, 0) if self.window else 0

    def advance(self, tokens: int) -> None:
        self.seen += tokens

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Columns of the mask and slot of the first; ``query`` is a length, or 4.57's positions."""
        length = query if isinstance(query, int) else query.shape[0]
        return self.seen - self.first_visible + length, self.first_visible

    def crop(self, length: int) -> None:
        """Keep ``length`` tokens, or drop ``-length`` (Transformers 4.57 and 5.x mean one each)."""
        keep = min(length, self.seen) if length > 0 else self.seen + length
        if keep < self.seen and self.first_visible:
            raise ValueError("crop: the sliding window has already dropped what would be needed.")
        self._keep_first(keep)
        self.seen = keep

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if (rows := self._rows()) is not None:
            self.batch_select_indices(rows.repeat_interleave(repeats))


class SequenceCacheLayer(RoutedCacheLayer):
    """One decision per sequence, and the keys and values ``[stored, heads, T, D]``.

    Stored are the sequences that keep the layer, or with ``everyone`` (the attention is not
    routed) all of them.
    """

    def __init__(self, window: int | None = None, *, everyone: bool = False) -> None:
        super().__init__(window)
        self.everyone = everyone
        self.kept: Tensor | None = None  # [B] bool, set by the prefill
        self.rows: Tensor | None = None  # indices of the kept sequences, ascending

    def decide(self, kept: Tensor) -> None:
        self.kept = kept
        self.rows = kept.nonzero().squeeze(-1)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(keys, values)
        if self.window:
            last = max(keys.shape[2] - self.window + 1, 0)
            self.keys, self.values = keys[:, :, last:], values[:, :, last:]
        return keys, values

    def reset(self) -> None:
        self.__init__(self.window, everyone=self.everyone)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Let sequence ``indices[i]`` become sequence ``i``."""
        if self.kept is None:
            return
        indices = indices.to(self.kept.device)
        stored = self._rows() if self.everyone else self.kept.cumsum(0) - 1
        self.decide(self.kept[indices])
        if self.is_initialized:
            stored = stored[indices if self.everyone else indices[self.rows]]
            self.keys, self.values = self.keys[stored], self.values[stored]

    def _rows(self) -> Tensor | None:
        return None if self.kept is None else torch.arange(len(self.kept), device=self.kept.device)

    def _keep_first(self, tokens: int) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[:, :, :tokens], self.values[:, :, :tokens]


class TokenCacheLayer(RoutedCacheLayer):
    """Keys and values of the kept tokens, ``[B, heads, longest selection, D]``, and whose they are.

    ``slots`` ``[B, longest]``: each key's place in its row of the text, ascending; -1: empty.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__(window)
        self.slots: Tensor | None = None

    def store(
        self, keys: Tensor, values: Tensor, kept: TokenSelection
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add the keys and values ``[N, heads, D]`` of this call's kept tokens.

        Returns all keys and values, ``[B, heads, L, D]``, and their slots, ``[B, L]``.
        """
        batch, tokens = kept.shape
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.keys = keys.new_zeros(batch, keys.shape[1], 0, keys.shape[2])
            self.values = values.new_zeros(self.keys.shape)
            self.slots = kept.index.new_zeros(batch, 0)
        before = self.slots.shape[1]
        places = (self.slots >= 0).sum(1)[kept.rows] + kept.ranks
        if batch == 1:
            grown = before + len(places)
        else:  # rows differ in length, so the longest is the device's to say
            grown = max(before, int(places.max()) + 1) if len(places) else before
        pad = (0, 0, 0, grown - before)
        self.keys, self.values = (nn.functional.pad(t, pad) for t in (self.keys, self.values))
        self.slots = nn.functional.pad(self.slots, pad[2:], value=-1)
        self.keys[kept.rows, :, places] = keys
        self.values[kept.rows, :, places] = values
        self.slots[kept.rows, places] = self.seen + kept.columns
        return self.keys, self.values, self.slots

    def advance(self, tokens: int) -> None:
        super().advance(tokens)
        if self.first_visible:
            self._retain(self.slots >= self.first_visible)

    def reset(self) -> None:
        self.__init__(self.window)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Let sequence ``indices[i]`` become sequence ``i``."""
        if self.is_initialized:
            indices = indices.to(self.slots.device)
            self.keys, self.values = self.keys[indices], self.values[indices]
            self.slots = self.slots[indices]
            self._retain(self.slots >= 0)

    def _rows(self) -> Tensor | None:
        return torch.arange(len(self.slots), device=self.slots.device) if self.seen else None

    def _keep_first(self, tokens: int) -> None:
        if self.is_initialized:
            self._retain((self.slots >= 0) & (self.slots < tokens))

    def _retain(self, wanted: Tensor) -> None:
        """Drop every stored token that is not ``wanted`` ``[B, L]``, and close the gaps."""
        longest = int(wanted.sum(1).max())
        order = wanted.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
        self.slots = self.slots.masked_fill(~wanted, -1).gather(1, order)
        order = order[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        self.keys, self.values = self.keys.gather(2, order), self.values.gather(2, order)


def prepare_cache(cache: Cache, config: RoutedConfig) -> Cache:
    """Give a new cache, in place, the storage the routed layers need; check one in use.

    Raises:
        ValueError: a cache that is no ``DynamicCache``, or that another model filled.
    """
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; what a routed layer stores has no fixed "
            "size and belongs to some sequences or tokens only: pass a DynamicCache, or none."
        )
    routing = config.routing
    target, unit = routing["granularity"].split("_")
    layers = DynamicCache(config=config).layers
    for index in routing["layers"]:
        if unit == "sequence":
            everyone = target == "mlp"
            layers[index] = SequenceCacheLayer(config.window(index), everyone=everyone)
        elif target != "mlp" and routing.get("keys_values") == "selected":
            layers[index] = TokenCacheLayer(config.window(index))
    if cache.get_seq_length() == 0:
        cache.layers, cache.layer_class_to_replicate = layers, None
        return cache
    routed = [type(layer) if isinstance(layer, RoutedCacheLayer) else None for layer in layers]
    found = [type(layer) if isinstance(layer, RoutedCacheLayer) else None for layer in cache.layers]
    if found != routed:
        raise ValueError(
            "past_key_values is a used cache that this model did not fill: pass an empty "
            "DynamicCache, or none."
        )
    return cache


# ------------------------------------------------------------------ the routed layer


@dataclass
class RoutingCall:
    """What the layers of one forward call share about routing, and what they report back."""

    pooled: Tensor | None  # [B, S]: tokens a sequence's decision may see; None: all
    tokens: Tensor | None  # [B, past + S]: tokens that are no padding; None: all
    decisions: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B] or [B, S] bool


class TokenSelection:
    """The kept tokens of a call, in the order of the text; ``N`` of them, from ``keep`` [B, S]."""

    def __init__(self, keep: Tensor) -> None:
        self.shape = keep.shape
        self.index = keep.flatten().nonzero().squeeze(-1)  # among all B * S
        self.rows = self.index // keep.shape[1]
        self.columns = self.index % keep.shape[1]
        self.ranks = (keep.cumsum(1) - 1).flatten()[self.index]  # among the row's kept tokens
        self.longest = len(self.index) if len(keep) == 1 else int(keep.sum(1).max())

    def pad(self, values: Tensor) -> Tensor:
        """``[N, ...]`` to ``[B, longest, ...]``, every row's at its start, zeros behind."""
        if self.shape[0] == 1:
            return values[None]
        padded = values.new_zeros(self.shape[0], self.longest, *values.shape[1:])
        padded[self.rows, self.ranks] = values
        return padded

    def unpad(self, padded: Tensor) -> Tensor:
        """The reverse of ``pad``."""
        return padded[0] if self.shape[0] == 1 else padded[self.rows, self.ranks]


class Router(nn.Module):
    """One linear map ``H -> 1`` without bias, computed in fp32."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[...]`` of hidden states ``[..., H]``."""
        return nn.functional.linear(hidden_states.float(), self.weight.float()).squeeze(-1)


class RoutedLayer:
    """Mixed into a family's decoder layer: what its router skips is not computed.

    Of the family it uses ``input_layernorm``, ``self_attn``, ``post_attention_layernorm`` and
    ``mlp``, each added to the residual stream as it is.
    """

    def __init__(self, config: RoutedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.router = None
        if layer_idx in config.routing["layers"]:
            self.router = Router(config.hidden_size)
            self.logit_border = logit_border(config.thresholds()[layer_idx])
            self.target, self.unit = config.routing["granularity"].split("_")
            self.stores_selected = config.routing.get("keys_values") == "selected"
            self.window = config.window(layer_idx)

    def forward(self, hidden_states: Tensor, *, routing: RoutingCall, **context: Any) -> Tensor:
        """``[B, S, H]`` to the same; ``context`` is what the family's layer takes."""
        if self.router is None:
            return super().forward(hidden_states, **context)
        route = self._by_sequence if self.unit == "sequence" else self._by_token
        return route(hidden_states, routing, context)

    def _by_sequence(self, hidden_states: Tensor, routing: RoutingCall, context: dict) -> Tensor:
        cache = context["past_key_values"]
        storage = SequenceCacheLayer() if cache is None else cache.layers[self.layer_idx]
        batch, length, _ = hidden_states.shape
        normed = None
        if storage.kept is None:
            normed = self.input_layernorm(hidden_states)
            storage.decide(self._sequences_to_keep(normed, routing))
        if len(storage.kept) != batch:
            raise ValueError(
                f"the cache holds the decisions of {len(storage.kept)} sequences, but the batch "
                f"has {batch}; reorder or repeat the cache with its own methods."
            )
        routing.decisions[self.layer_idx] = storage.kept
        rows = storage.rows

        def attend(kept: Tensor) -> Tensor:
            everyone = len(kept) == batch
            if normed is None:
                inputs = self.input_layernorm(kept)
            else:
                inputs = normed if everyone else normed[rows]
            chosen = context if everyone else _select(context, rows, batch)
            return kept + self.self_attn(hidden_states=inputs, **chosen)[0]

        if self.target == "attn":
            hidden_states = self._mlp(_at(rows, hidden_states, attend))
        elif self.target == "mlp":
            hidden_states = _at(rows, attend(hidden_states), self._mlp)
        else:
            hidden_states = _at(rows, hidden_states, lambda kept: self._mlp(attend(kept)))
        storage.advance(length)
        return hidden_states

    def _by_token(self, hidden_states: Tensor, routing: RoutingCall, context: dict) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        keep = self.router(normed) >= self.logit_border
        if routing.tokens is not None:
            keep &= routing.tokens[:, -keep.shape[1] :]
        routing.decisions[self.layer_idx] = keep
        kept = TokenSelection(keep)
        if self.target == "mlp":
            hidden_states = hidden_states + self.self_attn(hidden_states=normed, **context)[0]
            return _at(kept.index, hidden_states.flatten(0, 1), self._mlp).view_as(normed)
        update = self._attend_tokens(normed, kept, routing, context)
        finish = self._mlp if self.target == "block" else nn.Identity()
        hidden_states = _at(
            kept.index, hidden_states.flatten(0, 1), lambda tokens: finish(tokens + update)
        ).view_as(normed)
        return self._mlp(hidden_states) if self.target == "attn" else hidden_states

    def _mlp(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def _sequences_to_keep(self, normed: Tensor, routing: RoutingCall) -> Tensor:
        """``[B]`` bool: the mean logit of the pooled tokens reaches the border."""
        logits = self.router(normed)
        if routing.pooled is None:
            return logits.mean(1) >= self.logit_border
        count = routing.pooled.sum(1).clamp(min=1)
        return (logits * routing.pooled).sum(1) / count >= self.logit_border

    def _attend_tokens(
        self, normed: Tensor, kept: TokenSelection, routing: RoutingCall, context: dict
    ) -> Tensor:
        """The attention's update ``[N, H]`` of the kept tokens, from all normed ones."""
        attn, cache = self.self_attn, context["past_key_values"]
        batch, length, _ = normed.shape
        past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        rotary = [t.expand(batch, -1, -1).flatten(0, 1) for t in context["position_embeddings"]]
        every_token = normed.flatten(0, 1)
        chosen, chosen_rotary = every_token[kept.index], [t[kept.index] for t in rotary]
        if self.stores_selected:
            keys, values = _project(attn, "k", chosen, chosen_rotary), _project(attn, "v", chosen)
            storage = TokenCacheLayer() if cache is None else cache.layers[self.layer_idx]
            keys, values, slots = storage.store(keys, values, kept)
            storage.advance(length)
        else:
            shape = (batch, length, -1, attn.head_dim)
            keys = _project(attn, "k", every_token, rotary).view(shape).transpose(1, 2)
            values = _project(attn, "v", every_token).view(shape).transpose(1, 2)
            if cache is not None:
                keys, values = cache.update(keys, values, self.layer_idx)
            slots = torch.arange(past + length, device=normed.device)[-keys.shape[2] :]
            slots = slots.expand(batch, -1)
        if not len(kept.index):
            return chosen
        query = kept.pad(_project(attn, "q", chosen, chosen_rotary)).transpose(1, 2)
        visible = self._visible(kept.pad(past + kept.columns), slots, routing)
        if attn.config._attn_implementation == "eager":
            hidden = visible.logical_not().to(query.dtype) * torch.finfo(query.dtype).min
            attended, _ = eager_attention_forward(
                attn, query, keys, values, hidden, scaling=attn.scaling
            )
        else:  # flash attention knows no choice of queries among the keys
            attended, _ = sdpa_attention_forward(
                attn, query, keys, values, visible, scaling=attn.scaling
            )
        return attn.o_proj(kept.unpad(attended.flatten(2)))

    def _visible(self, queries: Tensor, slots: Tensor, routing: RoutingCall) -> Tensor:
        """``[B, 1, Q, K]`` bool: which stored keys each query sees, by both's slots in the text."""
        distance = queries[:, :, None] - slots[:, None, :]
        visible = (distance >= 0) & (slots >= 0)[:, None]
        if self.window:
            visible &= distance < self.window
        if routing.tokens is not None and not self.stores_selected:
            visible &= routing.tokens[:, None, -slots.shape[1] :]
        return visible[:, None]


def _at(index: Tensor, values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``values`` with ``function`` of the rows ``index`` (ascending) in those rows' place."""
    if len(index) == len(values):
        return function(values)
    if len(index) == 0:
        return values
    return values.index_copy(0, index, function(values[index]))


def _project(
    attn: nn.Module, name: str, hidden_states: Tensor, rotary: list[Tensor] | None = None
) -> Tensor:
    """Queries, keys or values ``[N, heads, D]`` of hidden states ``[N, H]``, as ``attn`` has them.

    ``rotary`` holds cosine and sine ``[N, D]`` of the tokens' positions.
    """
    heads = getattr(attn, f"{name}_proj")(hidden_states).view(len(hidden_states), -1, attn.head_dim)
    if norm := getattr(attn, f"{name}_norm", None):
        heads = norm(heads)
    if rotary is None:
        return heads
    cos, sin = (t[:, None] for t in rotary)
    return heads * cos + rotate_half(heads) * sin


def _select(value: Any, rows: Tensor, batch: int) -> Any:
    """The kept rows of every tensor with a batch dim in a layer's context; the rest as it is."""
    if isinstance(value, dict):
        return {name: _select(item, rows, batch) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_select(item, rows, batch) for item in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch:
        return value[rows]
    return value


# ------------------------------------------------------------------------- model


class RoutedModel:
    """Mixed into a family's model: its layers are routed ones, of class ``layer_class``."""

    layer_class: type[nn.Module]
    _keep_in_fp32_modules_strict = ("router",)
    supports_gradient_checkpointing = False

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)  # its dense layers cost nothing: from_pretrained builds on meta
        self.layers = nn.ModuleList(
            self.layer_class(config, index) for index in range(config.num_hidden_layers)
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's model; ``routing_mask`` ``[B, S]`` names the tokens that a sequence's
        decision may see (default: those ``attention_mask`` does not call padding)."""
        inputs = input_ids if input_ids is not None else inputs_embeds
        tokens = None if attention_mask is None else attention_mask.bool()
        if tokens is not None and tokens.dim() != 2:
            raise ValueError(
                f"attention_mask has {tokens.dim()} dims: routers must know which tokens are "
                "padding; pass one of [batch, tokens]."
            )
        pooled = routing_mask
        if pooled is None and tokens is not None:
            pooled = tokens[:, -inputs.shape[1] :]
        routing = RoutingCall(pooled, tokens)
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            past_key_values = prepare_cache(past_key_values, self.config)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing=routing,
            **kwargs,
        )


class RoutedCausalLM:
    """Mixed into a family's causal language model around a ``model_class``."""

    model_class: type[nn.Module]
    _keep_in_fp32_modules_strict = ("router",)
    supports_gradient_checkpointing = False

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()


# ---------------------------------------------------------------------- families


class MoDLlamaConfig(RoutedConfig, LlamaConfig):
    model_type = "mod_llama"

    def __init__(self, routing: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.routing = routing or NO_ROUTING
        super().__init__(**kwargs)
        self.check_routing()


class MoDLlamaDecoderLayer(RoutedLayer, LlamaDecoderLayer):
    pass


class MoDLlamaModel(RoutedModel, LlamaModel):
    config_class, layer_class = MoDLlamaConfig, MoDLlamaDecoderLayer
    _no_split_modules = ["MoDLlamaDecoderLayer"]


class MoDLlamaForCausalLM(RoutedCausalLM, LlamaForCausalLM):
    config_class, model_class = MoDLlamaConfig, MoDLlamaModel
    _no_split_modules = ["MoDLlamaDecoderLayer"]


class MoDMistralConfig(RoutedConfig, MistralConfig):
    model_type = "mod_mistral"

    def __init__(self, routing: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.routing = routing or NO_ROUTING
        super().__init__(**kwargs)
        self.check_routing()


class MoDMistralDecoderLayer(RoutedLayer, MistralDecoderLayer):
    pass


class MoDMistralModel(RoutedModel, MistralModel):
    config_class, layer_class = MoDMistralConfig, MoDMistralDecoderLayer
    _no_split_modules = ["MoDMistralDecoderLayer"]


class MoDMistralForCausalLM(RoutedCausalLM, MistralForCausalLM):
    config_class, model_class = MoDMistralConfig, MoDMistralModel
    _no_split_modules = ["MoDMistralDecoderLayer"]


class MoDQwen2Config(RoutedConfig, Qwen2Config):
    model_type = "mod_qwen2"

    def __init__(self, routing: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.routing = routing or NO_ROUTING
        super().__init__(**kwargs)
        self.check_routing()


class MoDQwen2DecoderLayer(RoutedLayer, Qwen2DecoderLayer):
    pass


class MoDQwen2Model(RoutedModel, Qwen2Model):
    config_class, layer_class = MoDQwen2Config, MoDQwen2DecoderLayer
    _no_split_modules = ["MoDQwen2DecoderLayer"]


class MoDQwen2ForCausalLM(RoutedCausalLM, Qwen2ForCausalLM):
    config_class, model_class = MoDQwen2Config, MoDQwen2Model
    _no_split_modules = ["MoDQwen2DecoderLayer"]


class MoDQwen3Config(RoutedConfig, Qwen3Config):
    model_type = "mod_qwen3"

    def __init__(self, routing: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.routing = routing or NO_ROUTING
        super().__init__(**kwargs)
        self.check_routing()


class MoDQwen3DecoderLayer(RoutedLayer, Qwen3DecoderLayer):
    pass


class MoDQwen3Model(RoutedModel, Qwen3Model):
    config_class, layer_class = MoDQwen3Config, MoDQwen3DecoderLayer
    _no_split_modules = ["MoDQwen3DecoderLayer"]


class MoDQwen3ForCausalLM(RoutedCausalLM, Qwen3ForCausalLM):
    config_class, model_class = MoDQwen3Config, MoDQwen3Model
    _no_split_modules = ["MoDQwen3DecoderLayer"]
