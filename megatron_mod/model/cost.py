"""What a pass through a model computes, layer by layer: counted, not timed.

Counted are matrix products, two floating-point operations for each multiplication; of attention
those of a query with the keys it sees. An embedding is looked up and counts nothing. Ranks that
share a layer or a sequence share all of this alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_mod.model.architecture import Architecture
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.costs import UnitCosts, Workload
from megatron_mod.routing.scheme import Place

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


class _Products(NamedTuple):
    """A layer's forward operations: attention's projections, scores and values, and the MLP."""

    projections: float
    scores: float
    mlp: float

    @property
    def forward(self) -> float:
        return sum(self)

    @property
    def backward(self) -> float:
        """To the layer's input: weights are frozen, so each product with one has one of its size,
        and only those of two activations have two."""
        return self.forward + self.scores


def forward_costs(arch: Architecture, *, length: int = LENGTH) -> Costs:
    """Of a forward pass of the dense model with logits at every token."""
    layer = round(_products(arch, _Text.of(arch, [length])).forward)
    return Costs((layer,) * arch.num_layers, _head(arch, length))


def workload(arch: Architecture, routing: RoutingConfig, lengths: Sequence[int]) -> Workload:
    """What a prefill of documents of these lengths computes, by what a model's places keep of them;
    as ``evaluation/work.py`` counts it, with logits of a document's last token.

    """
    text, scheme = _Text.of(arch, lengths), routing.scheme
    stand_in = 4 * arch.hidden_size * (routing.stand_in_rank or 0)
    table = []
    for place in routing.places:
        attends, token = place.target != "mlp", 0
        if attends:
            token += 2 * arch.query_weights
            token += 2 * arch.key_weights * (routing.keys_values != "all")
        if place.target != "attn":
            token += 2 * arch.mlp_weights
        table.append((0, token - stand_in, 4 * arch.query_channels * attends))
    units = len(lengths) if scheme.per_sequence else text.tokens
    sizes = (units, text.tokens, text.pairs)
    costs = UnitCosts(tuple(table), among_kept=routing.keys_values == "selected")
    layer = _products(arch, text).forward
    dense = round(arch.num_layers * layer) + _head(arch, len(lengths))
    routers = 2 * arch.hidden_size * text.tokens * len(routing.places)
    saved = sum(token * text.tokens + pair * text.pairs for _, token, pair in table)
    return Workload(costs, sizes, dense, dense + routers - saved)


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
) -> Costs:
    """Of training on documents of these lengths in tokens, ``labels`` of them labelled together.

    Every layer runs forward; those above the first routed one backward too, to their inputs, and so
    does the MLP of that one if only its attention is routed. The head runs both ways, at labelled
    tokens. With ``training_compute = sparse`` routed layers compute what is kept.

    Args:
        dense_passes: forward passes of the dense model beside it, as a distillation needs.
        num_free_layers: leading layers that are not run at all.
        recompute: what backward computes again (see ``model/recompute.py``).
        kept: the share that each router kept; without, what a training that is held to its
            target keeps on average over the steps.
    """
    text = _Text.of(arch, lengths)
    dense, first = _products(arch, text), routing.layers[0]
    kept = [_mean_share(routing, target) for target in routing.capacity] if kept is None else kept
    capacity = dict(zip(routing.places, kept, strict=True))
    router = 1 + 2 * (routing.stand_in_rank or 0)  # the stand-in is two products
    added = 2 * text.tokens * arch.hidden_size * router * len(routing.scheme.targets)
    attention_apart = "attn" in routing.scheme.targets
    found = []
    for layer in range(arch.num_layers):
        if layer < num_free_layers:
            found.append(0)
            continue
        own, more = dense, 0
        if layer in routing.layers:
            own, more = _routed(arch, routing, text, layer, capacity), added
        total = own.forward + more + dense_passes * dense.forward
        if layer > first:
            total += own.backward + more
        elif layer == first and attention_apart:
            total += own.mlp
        if layer >= first and recompute == "full":
            total += own.forward
        elif recompute == "selective" and (layer > first or attention_apart):
            total += own.mlp * (layer >= first)
        found.append(round(total))
    return Costs(tuple(found), _head(arch, labels) * (2 + dense_passes))


def _head(arch: Architecture, tokens: int) -> int:
    return 2 * arch.hidden_size * arch.vocab_size * tokens


def _mean_share(routing: RoutingConfig, target: float) -> float:
    """What is kept on average by a router held to this target once it has fallen there from 1."""
    return target + (1 - target) * routing.capacity_warmup_fraction / 2


def _routed(
    arch: Architecture,
    routing: RoutingConfig,
    text: _Text,
    layer: int,
    capacity: Mapping[Place, float],
) -> _Products:
    """Of a routed layer in training whose routers keep such shares."""
    if routing.training_compute == "dense":
        return _products(arch, text)
    scheme = routing.scheme
    queries, mlp = (
        1.0 if target is None else capacity[Place(layer, target)]
        for target in (scheme.attention_target, scheme.mlp_target)
    )
    keys = 1.0 if routing.keys_values == "all" else queries
    # Of a kept sequence every pair is computed; of kept tokens those of two that are kept.
    pairs = queries if scheme.per_sequence else queries * keys
    return _products(arch, text, queries=queries, keys=keys, pairs=pairs, mlp=mlp)


def _products(
    arch: Architecture,
    text: _Text,
    *,
    queries: float = 1.0,
    keys: float = 1.0,
    pairs: float = 1.0,
    mlp: float = 1.0,
) -> _Products:
    """Of a layer over documents, of which it computes these shares."""
    return _Products(
        2 * text.tokens * (queries * arch.query_weights + keys * arch.key_weights),
        4 * arch.query_channels * text.pairs * pairs,
        2 * text.tokens * arch.mlp_weights * mlp,
    )


def _visible_pairs(length: int, *, window: int | None) -> int:
    """How many keys the queries of a document see together, each itself and those before it."""
    near = min(length, window or length)
    return near * (near + 1) // 2 + (length - near) * near
