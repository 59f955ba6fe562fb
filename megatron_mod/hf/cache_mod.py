"""Keys and values of routed layers: stored for those that keep a layer, with their decisions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .answers_mod import Answers
from .configuration_mod import RoutedConfig
from .room_mod import GrowingLayer

# What a forward's cache is called: since Transformers 5.24 by the first name.
_PARAMETERS = inspect.signature(LlamaModel.forward).parameters
CACHE = next(name for name in ("cache", "past_key_values") if name in _PARAMETERS)


class Choice:
    """The kept among ``N`` units, in ascending order, from ``keep`` ``[N]`` bool."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    @cached_property
    def index(self) -> Tensor:
        """Where they are ``[kept]``; the host waits for their number."""
        return self._find()

    def _find(self) -> Tensor:
        return self.keep.flatten().nonzero().squeeze(-1)

    @property
    def is_everything(self) -> bool:
        return len(self.index) == self.keep.numel()

    @cached_property
    def order(self) -> Tensor:
        """The kept, then the others, each in their order, without waiting for the device."""
        return self.keep.flatten().byte().argsort(stable=True, descending=True)

    @property
    def others(self) -> Tensor:
        """Where the units are that are not kept."""
        return self.order[len(self.index) :]

    def left(self, values: Tensor) -> Tensor:
        """Of ``values`` ``[N, ...]`` those of the units that are not kept."""
        return values.index_select(0, self.others) if len(self.index) else values

    def apply(
        self,
        values: Tensor,
        function: Callable[[Tensor], Tensor],
        instead: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """``values`` ``[N, ...]`` with ``function`` of the kept in their place, and ``instead`` of
        the others in theirs; without it they stay."""
        if self.is_everything:
            return function(values)
        if not len(self.index):
            return instead(values) if instead else values
        changed = torch.empty_like(values) if instead else values.clone()
        changed.index_copy_(0, self.index, function(values.index_select(0, self.index)))
        if instead:
            changed.index_copy_(0, self.others, instead(self.left(values)))
        return changed


class TokenSelection(Choice):
    """The kept tokens of a call, in the order of the text, from ``keep`` ``[B, S]``: a choice among
    all ``B * S``; ``factors`` ``[B, S]`` multiply what tokens are given (none: 1)."""

    def __init__(self, keep: Tensor, factors: Tensor | None = None) -> None:
        super().__init__(keep)
        self.shape, self.of_all = keep.shape, factors
        # Of one token in a row there is too little to do while the number is on its way.
        self.is_late = self.shape[1] > 1 and Answers.are_late(keep.device)
        if self.is_late:
            self.answer = Answers().ask(keep.sum())

    def _find(self) -> Tensor:
        return self.order[: int(self.answer())] if self.is_late else super()._find()

    @cached_property
    def factors(self) -> Tensor | None:
        """Of each kept token ``[kept, 1]``."""
        return None if self.of_all is None else self.of_all.flatten()[self.index, None]

    def multiply(self, update: Tensor) -> Tensor:
        """What the kept tokens are given ``[N, H]``, by their factors."""
        return update if self.factors is None else self.factors * update

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
        """The kept of ``[B, S, ...]``, or of ``[1, S, ...]`` if the rows share it."""
        index = self.columns if len(values) == 1 else self.index
        return values.flatten(0, 1).index_select(0, index)

    def pad(self, values: Tensor) -> Tensor:
        """Of each kept token to ``[B, longest, ...]``, every row's at its start, zeros behind."""
        if self.shape[0] == 1:
            return values[None]
        padded = values.new_zeros(self.shape[0] * self.longest, *values.shape[1:])
        return padded.index_copy_(0, self.places, values).unflatten(0, (-1, self.longest))

    def unpad(self, padded: Tensor) -> Tensor:
        """The reverse of ``pad``."""
        if self.shape[0] == 1:
            return padded[0]
        return padded.flatten(0, 1).index_select(0, self.places)


class RoutedCacheLayer(GrowingLayer):
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
    """One decision per sequence and router, and the keys and values ``[stored, heads, T, D]``.

    Stored are the sequences that keep ``attention``, the target that covers it, or without one (the
    attention is not routed) all of them.
    """

    def __init__(self, window: int | None = None, *, attention: str | None = None) -> None:
        super().__init__(window)
        self.attention = attention
        self.choices: dict[str, Choice] = {}  # among the B sequences, set by the prefill

    @property
    def batch(self) -> int | None:
        """How many sequences have been decided on, if they have."""
        return next((len(choice.keep) for choice in self.choices.values()), None)

    def decide(self, kept: dict[str, Tensor]) -> None:
        """Take on the decisions ``[B]`` bool about each target."""
        self.choices = {target: Choice(keep) for target, keep in kept.items()}

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        if self.window:
            last = max(keys.shape[2] - self.window + 1, 0)
            self.keys, self.values = keys[:, :, last:], values[:, :, last:]
        return keys, values

    def reset(self) -> None:
        self.__init__(self.window, attention=self.attention)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Let sequence ``indices[i]`` become sequence ``i``."""
        if (stored := self._rows()) is None:
            return
        indices = indices.to(stored.device)
        if self.attention:
            stored = self.choices[self.attention].keep.cumsum(0) - 1
        self.decide({target: choice.keep[indices] for target, choice in self.choices.items()})
        if self.is_initialized:
            if self.attention:
                indices = indices[self.choices[self.attention].index]
            stored = stored[indices]
            self.keys, self.values = self.keys[stored], self.values[stored]

    def _rows(self) -> Tensor | None:
        keep = next((choice.keep for choice in self.choices.values()), None)
        return None if keep is None else torch.arange(len(keep), device=keep.device)

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
            keys, values = (t.transpose(0, 1)[None] for t in (keys, values))
            return self.append(keys, values, kept.columns)
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

    def append(
        self, keys: Tensor, values: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``store``, of the only sequence: keys and values ``[1, heads, N, D]`` of the tokens at
        these ``columns`` ``[N]`` of the call."""
        super().update(keys, values)
        self.slots = torch.cat([self.slots, self.seen + columns[None]], 1)
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


class EmptyCacheLayer(RoutedCacheLayer):
    """A layer that is skipped for good: nothing is stored, but how long the text is stays known."""

    def reset(self) -> None:
        self.__init__(self.window)

    def batch_select_indices(self, indices: Tensor) -> None:
        pass

    def _rows(self) -> None:
        return None

    def _keep_first(self, tokens: int) -> None:
        pass


def check_batch(batch: int, *, cached: int | None) -> None:
    if batch != cached:
        raise ValueError(
            f"the cache holds the decisions of {cached} sequences, but the batch has {batch}; "
            "reorder or repeat the cache with its own methods."
        )


def prepare_cache(cache: Cache, config: RoutedConfig, removed: Collection[int] = ()) -> Cache:
    """Give a new cache, in place, the storage the routed layers need; check one in use.

    Args:
        removed: layers whose attention is skipped for good.

    Raises:
        ValueError: a cache that is no ``DynamicCache``, or that another model filled.
    """
    if not isinstance(cache, DynamicCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; what a routed layer stores has no fixed "
            "size and belongs to some sequences or tokens only: pass a DynamicCache, or none."
        )
    kinds: dict[int, type[RoutedCacheLayer]] = {}
    if config.per_sequence:
        kinds = dict.fromkeys(config.routing["layers"], SequenceCacheLayer)
    elif config.stores_selected:
        kinds = dict.fromkeys(config.routing["layers"], TokenCacheLayer)
    kinds.update(dict.fromkeys(removed, EmptyCacheLayer))
    if cache.get_seq_length() == 0:
        layers = DynamicCache(config=config).layers
        cache.layers = [GrowingLayer() if type(each) is DynamicLayer else each for each in layers]
        cache.layer_class_to_replicate = None
        own = {"attention": config.attention_target} if config.per_sequence else {}
        for index, kind in kinds.items():
            cache.layers[index] = kind(config.window(index), **own)
        return cache
    found = {n: type(c) for n, c in enumerate(cache.layers) if isinstance(c, RoutedCacheLayer)}
    if found != kinds or len(cache.layers) != config.num_hidden_layers:
        raise ValueError(
            "past_key_values is a used cache that this model did not fill, or not with these "
            "thresholds: pass an empty DynamicCache, or none."
        )
    return cache
