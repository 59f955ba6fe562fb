"""What a pass through a model computes, layer by layer: counted, not timed.

Counted are matrix products, two floating-point operations for each multiplication; of attention
those of a query with the keys it sees. An embedding is looked up and counts nothing. Ranks that
share a layer or a sequence share all of this alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_mod.config.lora import TARGETS, LoraSettings
from megatron_mod.model.architecture import Architecture
from megatron_mod.routing.config import RoutingConfig

LENGTH = 512  # tokens of a sequence where nothing is known of them; only attention depends on it


@dataclass(frozen=True)
class Costs:
    """Floating-point operations of each layer, and of the output layer (the head)."""

    layers: tuple[int, ...]
    head: int

    def of(self, layout: Sequence[int]) -> list[int]:
        """Those of each of consecutive stages that hold so many layers; the last has the head."""
        found, first = [], 0
        for count in layout:
            found.append(sum(self.layers[first : first + count]))
            first += count
        found[-1] += self.head
        return found


class _Text(NamedTuple):
    """What of documents' lengths counts: their tokens, and the keys that all their queries see."""

    tokens: int
    pairs: int

    @classmethod
    def of(cls, arch: Architecture, lengths: Sequence[int]) -> _Text:
        pairs = sum(_visible_pairs(length, window=arch.window_size) for length in lengths)
        return cls(sum(lengths), pairs)


# Places in a layer, in the order in which they are computed: what is below it, its linears, a
# router's mask on its attention, and one on what comes out of it.
_BELOW, _QKV, _PROJ, _MASK, _FC1, _FC2, _END = -1, 0, 1, 2, 3, 4, 5


class _Products(NamedTuple):
    """A layer's forward operations: its linears', and attention's scores and values."""

    qkv: float
    scores: float
    proj: float
    fc1: float
    fc2: float

    @property
    def forward(self) -> float:
        return sum(self)

    @property
    def mlp(self) -> float:
        return self.fc1 + self.fc2

    def backward(self, down_to: int) -> float:
        """To the lowest place where something trains: weights are frozen, so each product with one
        has one of its size, and only those of two activations have two."""
        linears = {_QKV: self.qkv, _PROJ: self.proj, _FC1: self.fc1, _FC2: self.fc2}
        found = sum(own for place, own in linears.items() if place > down_to)
        return found + 2 * self.scores * (down_to <= _QKV)


class _Adapters(NamedTuple):
    """Forward operations of the adapters on one linear: with their ``A``, and with their ``B``."""

    inner: float
    outer: float

    def backward(self, *, trains: bool, goes_on: bool) -> float:
        """``goes_on``: something below trains too."""
        own = self.inner + self.outer if trains else 0.0
        return own + self.outer * (trains or goes_on) + self.inner * goes_on


def forward_costs(arch: Architecture, *, length: int = LENGTH) -> Costs:
    """Of a forward pass of the dense model with logits at every token."""
    layer = round(_products(arch, _Text.of(arch, [length]), _Shares()).forward)
    return Costs((layer,) * arch.num_layers, _head(arch, length))


def training_costs(
    arch: Architecture,
    routing: RoutingConfig,
    lengths: Sequence[int],
    *,
    labels: int,
    dense_passes: int = 0,
    num_free_layers: int = 0,
    recompute: str = "none",
    kept: Sequence[float] | None = None,
    lora: LoraSettings | None = None,
    parts: Sequence[str] = ("routers",),
) -> Costs:
    """Of training on documents of these lengths in tokens, ``labels`` of them labelled together.

    Every layer runs forward; those above the first with something that trains backward too, to
    their inputs, and that one down to what trains in it. The head runs both ways, at labelled
    tokens. With ``training_compute = sparse`` routed layers compute what is kept.

    Args:
        dense_passes: forward passes of the dense model beside it, as a distillation needs.
        num_free_layers: leading layers that are not run at all.
        recompute: what backward computes again (see ``model/recompute.py``).
        kept: the share that each routed layer kept; without, what a training that is held to its
            target keeps on average over the steps.
        lora: the model's adapters.
        parts: what trains (``train.trainable``).
    """
    text = _Text.of(arch, lengths)
    dense = _products(arch, text, _Shares())
    kept = [_mean_share(routing, target) for target in routing.capacity] if kept is None else kept
    capacity = dict(zip(routing.layers, kept, strict=True))
    routers_train, lora_trains = "routers" in parts, "lora" in parts
    width = 2 * text.tokens * arch.hidden_size
    router, stand_in = width, 2 * width * (routing.stand_in_rank or 0)  # that is two products
    trained = (*(routing.layers if routers_train else ()), *(_layers(lora) if lora_trains else ()))
    first, found = min(trained), []
    for layer in range(arch.num_layers):
        if layer < num_free_layers:
            found.append(0)
            continue
        is_routed = layer in capacity
        shares = _shares(routing, capacity[layer]) if is_routed else _Shares()
        own = _products(arch, text, shares)
        adapters = _adapters(arch, lora, text, shares) if layer in _layers(lora) else {}
        more = router + stand_in if is_routed else 0
        total = own.forward + more + dense_passes * dense.forward
        total += sum(each.inner + each.outer for each in adapters.values())
        if layer >= first:
            down_to = _BELOW
            if layer == first:
                masks = _mask(routing) if is_routed and routers_train else _END
                down_to = min((masks, *(adapters if lora_trains else ())))
                if recompute == "selective" and adapters and lora_trains and not is_routed:
                    down_to = _BELOW  # Megatron's own checkpoint asks for it
            else:
                total += stand_in * is_routed + router * (is_routed and routers_train)
            total += own.backward(down_to)
            total += sum(
                each.backward(trains=lora_trains, goes_on=place > down_to)
                for place, each in adapters.items()
            )
            again = adapters if recompute == "full" else {}
            if recompute == "full":
                total += own.forward
            elif recompute == "selective" and (down_to < _FC1 or (adapters and lora_trains)):
                total += own.mlp
                again = {k: v for k, v in adapters.items() if k in (_FC1, _FC2)}
            total += sum(each.inner + each.outer for each in again.values())
        found.append(round(total))
    return Costs(tuple(found), _head(arch, labels) * (2 + dense_passes))


def _layers(lora: LoraSettings | None) -> tuple[int, ...]:
    return () if lora is None else lora.layers


def _mask(routing: RoutingConfig) -> int:
    """Where a router's gradient comes from."""
    return _END if routing.scheme.covers_mlp else _MASK


def _head(arch: Architecture, tokens: int) -> int:
    return 2 * arch.hidden_size * arch.vocab_size * tokens


def _mean_share(routing: RoutingConfig, target: float) -> float:
    """What is kept on average by a layer held to this target once it has fallen there from 1."""
    return target + (1 - target) * routing.capacity_warmup_fraction / 2


class _Shares(NamedTuple):
    """Of a layer's tokens, or pairs of them, that it computes."""

    queries: float = 1.0
    keys: float = 1.0
    pairs: float = 1.0
    mlp: float = 1.0


def _shares(routing: RoutingConfig, kept: float) -> _Shares:
    """Of a routed layer in training that keeps such a share."""
    if routing.training_compute == "dense":
        return _Shares()
    scheme = routing.scheme
    queries = kept if scheme.covers_attention else 1.0
    keys = 1.0 if routing.keys_values == "all" else queries
    # Of a kept sequence every pair is computed; of kept tokens those of two that are kept.
    pairs = queries if scheme.per_sequence else queries * keys
    return _Shares(queries, keys, pairs, kept if scheme.covers_mlp else 1.0)


def _products(arch: Architecture, text: _Text, shares: _Shares) -> _Products:
    """Of a layer over documents."""
    width = 2 * text.tokens
    queries = shares.queries * arch.query_weights / 2  # of the query's projection, or the output's
    return _Products(
        width * (queries + shares.keys * arch.key_weights),
        4 * arch.query_channels * text.pairs * shares.pairs,
        width * queries,
        width * shares.mlp * arch.mlp_weights * 2 / 3,
        width * shares.mlp * arch.mlp_weights / 3,
    )


def _adapters(
    arch: Architecture, lora: LoraSettings | None, text: _Text, shares: _Shares
) -> dict[int, _Adapters]:
    """Of a layer, by the place of their linear: one product with all ``A`` of a linear, and one
    with their ``B`` for all its outputs."""
    assert lora is not None
    places = {"linear_qkv": _QKV, "linear_proj": _PROJ, "linear_fc1": _FC1, "linear_fc2": _FC2}
    found = {}
    for linear, place in places.items():
        members = [target for target, of in TARGETS.items() if of == linear]
        ranks = lora.rank * sum(target in lora.targets for target in members)
        if not ranks:
            continue
        inputs = arch.projections[members[0]][0]
        outputs = sum(arch.projections[target][1] for target in members)
        inner = outer = shares.mlp if place in (_FC1, _FC2) else shares.queries
        if place == _QKV and shares.queries != shares.keys:  # queries apart from keys and values
            inner = shares.queries + shares.keys
            part = arch.query_channels / outputs
            outer = shares.queries * part + shares.keys * (1 - part)
        width = 2 * text.tokens * ranks
        found[place] = _Adapters(width * inputs * inner, width * outputs * outer)
    return found


def _visible_pairs(length: int, *, window: int | None) -> int:
    """How many keys the queries of a document see together, each itself and those before it."""
    near = min(length, window or length)
    return near * (near + 1) // 2 + (length - near) * near
