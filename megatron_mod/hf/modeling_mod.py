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

From top to bottom: configuration, thresholds, caches, the routed layer, model, generation,
families.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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

# What a forward's cache is called: since Transformers 5.24 by the first name.
_PARAMETERS = inspect.signature(LlamaModel.forward).parameters
CACHE = next(name for name in ("cache", "past_key_values") if name in _PARAMETERS)

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


# -------------------------------------------------------------------- thresholds

MOST = 30.0  # the largest logit whose sigmoid is told apart from 1
SLACK = 0.002  # of the units, given up for a border that no score is near
ROUNDING = 1e-5  # relative; scores closer than this may be the same, computed twice
PASSES = 20  # over a text, to find one border for all layers


def threshold_at(border: float) -> float:
    """The sigmoid of a logit, of which ``logit_border`` is the inverse.

    Raises:
        ValueError: a logit that no threshold between 0 and 1 can express.
    """
    if math.isinf(border):
        return 1.0 if border > 0 else 0.0
    if abs(border) > MOST:
        raise ValueError(
            f"the routers' scores lie around the logit {border:.0f}, which no threshold between 0 "
            "and 1 can express; train them with a smaller optimizer.lr."
        )
    return 1.0 / (1.0 + math.exp(-border))


def border_at(scores: Tensor, capacity: float) -> float:
    """The logit from which on about ``capacity`` of the units with these ``[N]`` is kept; infinite
    where all or none are.

    Units with one score (a token that a text repeats, the beginning that all samples share) are
    kept or skipped together, however often it was computed. The border lies in the middle of the
    widest gap between two scores within ``SLACK`` of the wanted share, or, if rounding would decide
    about more than ``SLACK`` of the units there, as near to that share as it does not.

    Raises:
        ValueError: a score that is no finite number.
    """
    ranked = _ranked(scores)
    if not len(ranked):
        return -math.inf
    wanted = capacity * len(ranked)
    middles = (ranked[:-1] + ranked[1:]) / 2  # behind the first, the second, ...
    miss = (torch.arange(1, len(ranked)) - wanted).abs()
    miss = miss.masked_fill(~_is_sound(middles, ranked), math.inf)
    nearest = float(miss.min()) if len(miss) else math.inf
    if min(wanted, len(ranked) - wanted) < nearest:
        return math.inf if wanted < len(ranked) / 2 else -math.inf
    within = miss <= max(nearest, SLACK * len(ranked))
    gaps = ranked[:-1] - ranked[1:]
    return float(middles[gaps.masked_fill(~within, -1).argmax()])


def settled_border(scores: Tensor, border: float) -> float | None:
    """The border in the middle of its gap, which keeps the same of the units with these scores
    ``[N]``; None where rounding decides about more than ``SLACK`` of them, here or there."""
    ranked = _ranked(scores)
    kept = int((ranked >= border).sum())
    middle = math.inf
    if kept == len(ranked):
        middle = -math.inf
    elif kept:
        middle = float(ranked[kept - 1 : kept + 1].mean())
    finite = [b for b in (border, middle) if math.isfinite(b)]
    return middle if _is_sound(torch.tensor(finite, dtype=ranked.dtype), ranked).all() else None


def common_border(
    scores_at: Callable[[float], Tensor],
    capacity: float,
    *,
    known: dict[float, Tensor] | None = None,
    tolerance: float | None = None,
) -> float:
    """The border of all layers at which about ``capacity`` of their units is kept.

    A border moves what later layers see, and with it their scores, so it is found by repetition:
    each pass places it by the scores of the pass before (``border_at``), or halves what earlier
    ones leave if that leads out of them. The search ends where scores put the border that made
    them.

    Args:
        scores_at: all layers' scores ``[N]`` at a border.
        known: what that is known to answer.
        tolerance: a capacity this near is near enough, if no score is near its border.
    """
    known = dict(known) if known else {-math.inf: scores_at(-math.inf)}

    def kept(border: float) -> float:
        return float((known[border] >= border).double().mean())

    def miss(border: float) -> float:
        return abs(kept(border) - capacity)

    border = min(known, key=miss)
    for _ in range(PASSES):
        scores = known[border]
        settled = settled_border(scores, border)
        if tolerance is not None and settled is not None and miss(border) <= tolerance:
            return settled
        found = border_at(scores, capacity)
        if found == settled:
            return found
        low = max((b for b in known if kept(b) >= capacity), default=-math.inf)
        high = min((b for b in known if kept(b) < capacity), default=math.inf)
        if not low < found < high and low < high and math.isfinite(high - low):
            found = (low + high) / 2
        if found in known:
            break
        border = found
        known[border] = scores_at(border)
    sound = {b: s for b in known if (s := settled_border(known[b], b)) is not None}
    return sound[min(sound, key=miss)]


def _ranked(scores: Tensor) -> Tensor:
    """The scores in descending order, in double precision on the CPU."""
    ranked = scores.detach().cpu().double().sort(descending=True).values
    if not ranked.isfinite().all():
        raise ValueError(
            "the routers' scores are not all finite numbers; the weights of the model or of its "
            "routers hold inf or NaN."
        )
    return ranked


def _is_sound(borders: Tensor, ranked: Tensor) -> Tensor:
    """Whether rounding decides about at most ``SLACK`` of the ranked scores at each border, and
    about none that are equal."""
    if not len(ranked):
        return torch.ones_like(borders, dtype=torch.bool)
    reach = ROUNDING * borders.abs().clamp(min=float(ranked.abs().median()))
    ascending = ranked.flip(0)
    near = torch.searchsorted(ascending, borders + reach, right=True)
    near -= torch.searchsorted(ascending, borders - reach)
    above = torch.searchsorted(ascending, borders)
    between = above == torch.searchsorted(ascending, borders, right=True)
    return between & (near <= SLACK * len(ranked))


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
        batch = kept.shape[0]
        if self.slots is not None:
            check_batch(batch, cached=len(self.slots))
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.keys = keys.new_zeros(batch, keys.shape[1], 0, keys.shape[2])
            self.values = values.new_zeros(self.keys.shape)
            self.slots = kept.index.new_zeros(batch, 0)
        if batch == 1:
            self.keys = torch.cat([self.keys, keys.transpose(0, 1)[None]], 2)
            self.values = torch.cat([self.values, values.transpose(0, 1)[None]], 2)
            self.slots = torch.cat([self.slots, self.seen + kept.columns[None]], 1)
            return self.keys, self.values, self.slots
        before = self.slots.shape[1]
        places = (self.slots >= 0).sum(1)[kept.rows] + kept.ranks
        grown = before
        if len(places):  # rows differ in length, so the longest is the device's to say
            grown = max(before, int(places.max()) + 1)
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


def check_batch(batch: int, *, cached: int) -> None:
    if batch != cached:
        raise ValueError(
            f"the cache holds the decisions of {cached} sequences, but the batch has {batch}; "
            "reorder or repeat the cache with its own methods."
        )


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
    routing, kind, settings = config.routing, None, {}
    target, unit = routing["granularity"].split("_")
    if unit == "sequence":
        kind, settings = SequenceCacheLayer, {"everyone": target == "mlp"}
    elif target != "mlp" and routing.get("keys_values") == "selected":
        kind = TokenCacheLayer
    routed = routing["layers"] if kind else []
    if cache.get_seq_length() == 0:
        cache.layers = DynamicCache(config=config).layers
        cache.layer_class_to_replicate = None
        for index in routed:
            cache.layers[index] = kind(config.window(index), **settings)
        return cache
    found = {n: type(c) for n, c in enumerate(cache.layers) if isinstance(c, RoutedCacheLayer)}
    if found != dict.fromkeys(routed, kind) or len(cache.layers) != config.num_hidden_layers:
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
    borders: CapacityBorders | WatchedBorders | None = None  # found, or given, on the way
    decisions: dict[int, Tensor] = field(default_factory=dict)  # layer -> [B] or [B, S] bool


class TokenSelection:
    """The kept tokens of a call, in the order of the text; ``N`` of them, from ``keep`` [B, S]."""

    def __init__(self, keep: Tensor) -> None:
        self.keep, self.shape = keep, keep.shape
        self.index = keep.flatten().nonzero().squeeze(-1)  # among all B * S

    @cached_property
    def rows(self) -> Tensor:
        return self.index // self.shape[1]

    @cached_property
    def columns(self) -> Tensor:
        return self.index if self.shape[0] == 1 else self.index % self.shape[1]

    @cached_property
    def ranks(self) -> Tensor:
        """Each token's place among its row's kept ones."""
        return self.keep.cumsum(1).flatten()[self.index] - 1

    @cached_property
    def longest(self) -> int:
        return 1 if self.shape[1] == 1 else int(self.keep.sum(1).max())

    @cached_property
    def places(self) -> Tensor:
        """Each token's place among the ``B * longest`` of ``pad``."""
        return self.index if self.shape[1] == 1 else self.rows * self.longest + self.ranks

    def take(self, values: Tensor) -> Tensor:
        """``[N, ...]`` of ``[B, S, ...]``, or of ``[1, S, ...]`` if the rows share it."""
        return values[0, self.columns] if len(values) == 1 else values.flatten(0, 1)[self.index]

    def pad(self, values: Tensor) -> Tensor:
        """``[N, ...]`` to ``[B, longest, ...]``, every row's at its start, zeros behind."""
        if self.shape[0] == 1:
            return values[None]
        padded = values.new_zeros(self.shape[0] * self.longest, *values.shape[1:])
        return padded.index_copy_(0, self.places, values).unflatten(0, (-1, self.longest))

    def unpad(self, padded: Tensor) -> Tensor:
        """The reverse of ``pad``."""
        return padded[0] if self.shape[0] == 1 else padded.flatten(0, 1)[self.places]


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
        cache = context[CACHE]
        storage = SequenceCacheLayer() if cache is None else cache.layers[self.layer_idx]
        batch, length, _ = hidden_states.shape
        normed = None
        if storage.kept is None:
            normed = self.input_layernorm(hidden_states)
            storage.decide(self._sequences_to_keep(normed, routing))
        check_batch(batch, cached=len(storage.kept))
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
        keep = self._tokens_to_keep(normed, routing)
        routing.decisions[self.layer_idx] = keep
        kept = TokenSelection(keep)
        everything = len(kept.index) == keep.numel()
        if self.target == "mlp" or (everything and not self.stores_selected):
            hidden_states = hidden_states + self.self_attn(hidden_states=normed, **context)[0]
            if self.target == "attn":
                return self._mlp(hidden_states)
            return _at(kept.index, hidden_states.flatten(0, 1), self._mlp).view_as(normed)
        update = self._attend_tokens(normed, kept, routing, context)

        def finish(tokens: Tensor) -> Tensor:
            tokens = tokens + update
            return self._mlp(tokens) if self.target == "block" else tokens

        hidden_states = _at(kept.index, hidden_states.flatten(0, 1), finish).view_as(normed)
        return self._mlp(hidden_states) if self.target == "attn" else hidden_states

    def _mlp(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def _sequences_to_keep(self, normed: Tensor, routing: RoutingCall) -> Tensor:
        """``[B]`` bool: the mean logit of the pooled tokens reaches the border."""
        logits = self.router(normed)
        if routing.pooled is None:
            logits = logits.mean(1)
        else:
            logits = (logits * routing.pooled).sum(1) / routing.pooled.sum(1).clamp(min=1)
        return logits >= self._border(logits, routing)

    def _tokens_to_keep(self, normed: Tensor, routing: RoutingCall) -> Tensor:
        """``[B, S]`` bool: the token's logit reaches the border, and it is no padding."""
        logits = self.router(normed)
        if routing.tokens is None:
            return logits >= self._border(logits.flatten(), routing)
        valid = routing.tokens[:, -logits.shape[1] :]
        border = self._border(logits[valid], routing) if routing.borders else self.logit_border
        return (logits >= border) & valid

    def _border(self, logits: Tensor, routing: RoutingCall) -> float:
        """The logit from which on this layer is kept, or the one that these ``[N]`` ask for."""
        if routing.borders is None:
            return self.logit_border
        return routing.borders.find(self.layer_idx, logits)

    def _attend_tokens(
        self, normed: Tensor, kept: TokenSelection, routing: RoutingCall, context: dict
    ) -> Tensor:
        """The attention's update ``[N, H]`` of the kept tokens, from all normed ones."""
        attn, cache = self.self_attn, context[CACHE]
        batch, length, _ = normed.shape
        past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        rotary, slots = context["position_embeddings"], None
        chosen, chosen_rotary = kept.take(normed), [kept.take(t) for t in rotary]
        if self.stores_selected:
            storage = TokenCacheLayer() if cache is None else cache.layers[self.layer_idx]
            if len(kept.index) or not storage.is_initialized:
                keys = _project(attn, "k", chosen, chosen_rotary)
                keys, values, slots = storage.store(keys, _project(attn, "v", chosen), kept)
            storage.advance(length)
            plain = batch == length == 1 or not (past or self.window)
        else:
            keys = _project(attn, "k", normed, rotary).transpose(1, 2)
            values = _project(attn, "v", normed).transpose(1, 2)
            if cache is not None:
                keys, values = cache.update(keys, values, self.layer_idx)
            plain = length == 1 and context["attention_mask"] is None
        if not len(kept.index):
            return chosen
        query = kept.pad(_project(attn, "q", chosen, chosen_rotary)).transpose(1, 2)
        eager, visible = attn.config._attn_implementation == "eager", None
        if eager or not plain:  # else all keys are seen, or by place all up to the query's own
            if slots is None:
                slots = torch.arange(past + length, device=normed.device)[-keys.shape[2] :]
                slots = slots.expand(batch, -1)
            visible = self._visible(kept.pad(past + kept.columns), slots, routing)
        if eager:
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
    """Queries, keys or values ``[..., heads, D]`` of hidden states ``[..., H]``, as ``attn`` has
    them; ``rotary`` holds cosine and sine ``[..., D]`` of the tokens' positions."""
    heads = getattr(attn, f"{name}_proj")(hidden_states).unflatten(-1, (-1, attn.head_dim))
    if norm := getattr(attn, f"{name}_norm", None):
        heads = norm(heads)
    if rotary is None:
        return heads
    cos, sin = (t.unsqueeze(-2) for t in rotary)
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


class RoutingControls:
    """What a routed model offers beside its family's methods; ``_decoder`` holds the layers."""

    supports_gradient_checkpointing = False
    _supports_flex_attn = False  # its block masks cannot be taken apart by sequence

    def _finish_init(self) -> None:
        routed = bool(self.config.routing["layers"])
        self._keep_in_fp32_modules_strict = ["router"] if routed else None
        self.post_init()

    @property
    def _decoder(self) -> RoutedModel:
        return getattr(self, "model", self)

    def _routed_layers(self) -> dict[int, RoutedLayer]:
        return {index: self._decoder.layers[index] for index in self.config.routing["layers"]}

    def set_thresholds(self, threshold: float | Sequence[float]) -> None:
        """Keep a unit where ``sigmoid(logit)`` reaches ``threshold``: one number from 0 (keep all)
        to 1 (skip all), or one per routed layer. ``save_pretrained`` writes it.

        Raises:
            ValueError: another number of thresholds than routed layers, or one out of range.
        """
        before = self.config.routing
        listed = list(threshold) if isinstance(threshold, (list, tuple)) else threshold
        self.config.routing = {**before, "threshold": listed}
        try:
            thresholds = self.config.thresholds()
        except ValueError:
            self.config.routing = before
            raise
        for index, layer in self._routed_layers().items():
            layer.logit_border = logit_border(thresholds[index])

    @torch.no_grad()
    def set_capacity(
        self,
        capacity: float | Sequence[float],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        scope: str | None = None,
    ) -> None:
        """Set the routed layers' thresholds so that ``capacity`` of a text's units is kept.

        Args:
            capacity: share of the units (sequences or tokens) from 0 to 1; one number, or with
                ``scope="layer"`` one per routed layer.
            input_ids, attention_mask: ``[B, S]``, a text of the kind the model will see. For
                a sequence granularity: prompts, and enough of them.
            scope: ``layer`` holds every layer to its capacity (in one pass, each layer sees what
                the ones before it leave); ``model`` gives all one threshold, at which their mean
                has it (in at most 20 passes). None: as the routers were trained.

        Units with one score are kept or skipped together, so a capacity may be met only nearly;
        ``routing_report`` tells of the next call.

        Raises:
            ValueError: a capacity or scope out of range, another number of capacities than routed
                layers, or scores that no threshold can tell apart.
        """
        routed = self.config.routing["layers"]
        several = isinstance(capacity, (list, tuple))
        scope = scope or ("layer" if several else self.config.routing.get("scope", "layer"))
        targets = list(capacity) if several else [capacity] * len(routed)
        if len(targets) != len(routed) or any(not 0.0 <= value <= 1.0 for value in targets):
            raise ValueError(
                f"capacity = {capacity}: must be a number from 0 to 1, or one per routed layer "
                f"({len(routed)})."
            )
        if scope not in ("layer", "model") or (several and scope == "model"):
            raise ValueError(
                f"scope = {scope!r}: must be 'layer', or 'model' with one capacity for all."
            )
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if scope == "layer":
            borders = CapacityBorders(dict(zip(routed, targets, strict=True)))
            self._decoder(**inputs, borders=borders)
            self.set_thresholds([threshold_at(borders.found[index]) for index in routed])
            return

        def scores_at(border: float) -> Tensor:
            watched = WatchedBorders(border)
            self._decoder(**inputs, borders=watched)
            return torch.cat(watched.scores)

        border = common_border(scores_at, targets[0])
        self.set_thresholds([threshold_at(border)] * len(routed))

    def routing_report(self) -> dict[str, Any]:
        """What the last call skipped and what it saved; after ``generate``, the whole of it.

        ``layers`` has, for each routed layer's index, the ``kept`` of its ``units`` (sequences,
        or tokens without padding) and their ratio ``capacity``, and ``cache_bytes`` with the
        ``cache_bytes_saved`` against the dense layer's. The sums are beside it.

        Raises:
            ValueError: there was no call yet.
        """
        record = self._decoder.record
        if record is None:
            raise ValueError("routing_report: the model has not been called yet.")
        return {"granularity": self.config.routing["granularity"], **record.summary()}


class CapacityBorders:
    """Finds each routed layer's border, from the top down, in one pass."""

    def __init__(self, capacity: dict[int, float]) -> None:
        self.capacity = capacity
        self.found: dict[int, float] = {}

    def find(self, layer: int, logits: Tensor) -> float:
        """The border at which the layer's capacity of the units with ``logits`` ``[N]`` is kept."""
        self.found[layer] = border_at(logits, self.capacity[layer])
        return self.found[layer]


class WatchedBorders:
    """Gives all layers one border, and keeps their scores."""

    def __init__(self, border: float) -> None:
        self.border = border
        self.scores: list[Tensor] = []

    def find(self, layer: int, logits: Tensor) -> float:
        self.scores.append(logits)
        return self.border


class RoutingRecord:
    """Decisions and cache sizes of one call, or of the calls of one ``generate``."""

    def __init__(self) -> None:
        self.decisions: dict[int, list[Tensor]] = {}  # counted only when somebody asks
        self.tokens: Tensor | int = 0  # of all calls, without padding
        self.cache_bytes: dict[int, tuple[int, int]] = {}  # held, and by a dense layer

    def add(self, model: RoutedModel, routing: RoutingCall, cache: Cache | None) -> None:
        """Take note of a forward call, without waiting for the device."""
        for layer, keep in routing.decisions.items():
            if keep.dim() == 1:  # a sequence stays what it is at later steps
                self.decisions[layer] = [keep]
            else:
                self.decisions.setdefault(layer, []).append(keep)
            if cache is not None:
                sizes = _cache_bytes(model, layer, cache.layers[layer], batch=len(keep))
                self.cache_bytes[layer] = sizes
        if routing.decisions and keep.dim() == 2:
            valid = routing.tokens
            self.tokens += keep.numel() if valid is None else valid[:, -keep.shape[1] :].sum()

    def summary(self) -> dict[str, Any]:
        layers = {}
        for layer, decisions in self.decisions.items():
            held, dense = self.cache_bytes.get(layer, (0, 0))
            by_sequence = decisions[0].dim() == 1
            layers[layer] = {
                "kept": int(sum(keep.sum() for keep in decisions)),
                "units": len(decisions[0]) if by_sequence else int(self.tokens),
                "cache_bytes": held,
                "cache_bytes_saved": dense - held,
            }
        names = ("kept", "units", "cache_bytes", "cache_bytes_saved")
        total = {name: sum(entry[name] for entry in layers.values()) for name in names}
        for entry in (total, *layers.values()):
            entry["capacity"] = entry["kept"] / entry["units"] if entry["units"] else 1.0
        return {**total, "layers": layers}


def _cache_bytes(
    model: RoutedModel, layer: int, storage: DynamicLayer, *, batch: int
) -> tuple[int, int]:
    """What a layer's cache holds, and what it would hold were everything stored."""
    routed, length = model.layers[layer], storage.get_seq_length()
    length = min(length, routed.window - 1) if routed.window else length
    token = 2 * routed.self_attn.k_proj.out_features * model.embed_tokens.weight.element_size()
    dense = batch * length * token
    held = [tensor for tensor in (storage.keys, storage.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in held), dense


@torch.compiler.assume_constant_result  # so that it runs, and stops, while the model is traced
def refuse_compiling() -> None:
    raise ValueError(
        "torch.compile: what is computed depends on the routers' decisions, so shapes change from "
        "call to call; run the model as it is."
    )


class RoutedModel(RoutingControls):
    """Mixed into a family's model: its layers are routed ones, of class ``layer_class``."""

    layer_class: type[nn.Module]

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)  # its dense layers cost nothing: from_pretrained builds on meta
        self.layers = nn.ModuleList(
            self.layer_class(config, index) for index in range(config.num_hidden_layers)
        )
        self._no_split_modules = [self.layer_class.__name__]
        self.record: RoutingRecord | None = None  # of the last call
        self.recording: RoutingRecord | None = None  # of the ``generate`` that is under way
        self._finish_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing_mask: Tensor | None = None,
        borders: CapacityBorders | WatchedBorders | None = None,
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's model, whose cache is ``past_key_values`` or ``cache``; ``routing_mask``
        ``[B, S]`` names the tokens that a sequence's decision may see (default: those that
        ``attention_mask`` does not call padding)."""
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one thing: pass one.")
        if use_cache is None:
            use_cache = self.config.use_cache
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            cache = prepare_cache(cache, self.config)
        self._refuse(attention_mask, position_ids, cache, routing_mask, kwargs)
        length = (input_ids if input_ids is not None else inputs_embeds).shape[1]
        tokens = None if attention_mask is None else attention_mask.bool()
        pooled = routing_mask
        if pooled is None and tokens is not None:
            pooled = tokens[:, -length:]
        routing = RoutingCall(pooled, tokens, borders)
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing=routing,
            **{CACHE: cache},
            **kwargs,
        )
        self.record = self.recording or RoutingRecord()
        self.record.add(self, routing, cache)
        return output

    def _refuse(
        self,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        routing_mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> None:
        """Raise ``ValueError`` for what would silently be wrong, with the reason."""
        granularity = self.config.routing["granularity"]
        if torch.compiler.is_compiling():
            refuse_compiling()
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.dim()} dims: routers must know which tokens "
                "are padding; pass one of [batch, tokens]."
            )
        if routing_mask is not None and granularity.endswith("token"):
            raise ValueError(
                f"routing_mask: with granularity {granularity!r} each token decides for itself; "
                "leave it out."
            )
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError("output_attentions: what was skipped has none; leave it out.")
        packed = any(name.startswith("cu_seq_lens") for name in kwargs)
        if position_ids is not None and attention_mask is None and cache is None:
            packed = packed or bool((position_ids.diff(dim=-1) != 1).any())
        if packed:
            raise ValueError(
                "several texts are packed into one row (position_ids restart, or cu_seq_lens is "
                "given): a row is routed as one text; give each its own row, with attention_mask."
            )


class RoutedCausalLM(RoutingControls):
    """Mixed into a family's causal language model around a ``model_class``."""

    model_class: type[nn.Module]

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self._finish_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers' ``generate``; ``routing_report`` then covers all its steps."""
        self.model.recording, self.prompt_mask = RoutingRecord(), None
        try:
            return super().generate(*args, **kwargs)
        finally:
            self.model.recording = None

    def _validate_generation_mode(self, mode: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super()._validate_generation_mode(mode, config, *args, **kwargs)
        granularity = self.config.routing["granularity"]
        if granularity.endswith("token"):
            return
        reason = (
            f"with granularity {granularity!r} a sequence's decision is its whole prompt's, and"
        )
        if config.prefill_chunk_size is not None:
            raise ValueError(f"prefill_chunk_size: {reason} the first chunk would make it alone.")
        if "assisted" in str(getattr(mode, "value", mode)):
            raise ValueError(
                f"assisted decoding: {reason} the assistant's guesses would be part of it."
            )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without a cache each step runs the whole text: let the prompt alone decide again."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        by_sequence = self.config.routing["granularity"].endswith("sequence")
        if by_sequence and self.model.recording and inputs.get(CACHE) is None:
            text = inputs.get("input_ids")
            text = text if text is not None else inputs["inputs_embeds"]
            if self.prompt_mask is None:
                mask = inputs.get("attention_mask")
                ones = torch.ones(text.shape[:2], device=text.device, dtype=torch.bool)
                self.prompt_mask = ones if mask is None else mask
            new = text.shape[1] - self.prompt_mask.shape[1]
            inputs["routing_mask"] = nn.functional.pad(self.prompt_mask, (0, new))
        return inputs


# ---------------------------------------------------------------------- families


class MoDLlamaConfig(RoutedConfig, LlamaConfig):
    model_type = "mod_llama"

    def __init__(self, routing: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.routing = dict(routing or NO_ROUTING)
        super().__init__(**kwargs)
        self.check_routing()


class MoDLlamaDecoderLayer(RoutedLayer, LlamaDecoderLayer):
    pass


class MoDLlamaModel(RoutedModel, LlamaModel):
    config_class, layer_class = MoDLlamaConfig, MoDLlamaDecoderLayer


class MoDLlamaForCausalLM(RoutedCausalLM, LlamaForCausalLM):
    config_class, model_class = MoDLlamaConfig, MoDLlamaModel


class MoDMistralConfig(RoutedConfig, MistralConfig):
    model_type = "mod_mistral"

    def __init__(self, routing: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.routing = dict(routing or NO_ROUTING)
        super().__init__(**kwargs)
        self.check_routing()


class MoDMistralDecoderLayer(RoutedLayer, MistralDecoderLayer):
    pass


class MoDMistralModel(RoutedModel, MistralModel):
    config_class, layer_class = MoDMistralConfig, MoDMistralDecoderLayer


class MoDMistralForCausalLM(RoutedCausalLM, MistralForCausalLM):
    config_class, model_class = MoDMistralConfig, MoDMistralModel


class MoDQwen2Config(RoutedConfig, Qwen2Config):
    model_type = "mod_qwen2"

    def __init__(self, routing: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.routing = dict(routing or NO_ROUTING)
        super().__init__(**kwargs)
        self.check_routing()


class MoDQwen2DecoderLayer(RoutedLayer, Qwen2DecoderLayer):
    pass


class MoDQwen2Model(RoutedModel, Qwen2Model):
    config_class, layer_class = MoDQwen2Config, MoDQwen2DecoderLayer


class MoDQwen2ForCausalLM(RoutedCausalLM, Qwen2ForCausalLM):
    config_class, model_class = MoDQwen2Config, MoDQwen2Model


class MoDQwen3Config(RoutedConfig, Qwen3Config):
    model_type = "mod_qwen3"

    def __init__(self, routing: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.routing = dict(routing or NO_ROUTING)
        super().__init__(**kwargs)
        self.check_routing()


class MoDQwen3DecoderLayer(RoutedLayer, Qwen3DecoderLayer):
    pass


class MoDQwen3Model(RoutedModel, Qwen3Model):
    config_class, layer_class = MoDQwen3Config, MoDQwen3DecoderLayer


class MoDQwen3ForCausalLM(RoutedCausalLM, Qwen3ForCausalLM):
    config_class, model_class = MoDQwen3Config, MoDQwen3Model
