"""What a pass through a model computes, layer by layer: counted, not timed.

Counted are matrix products, two floating-point operations for each multiplication; of attention
those of a query with the keys it sees. An embedding is looked up and counts nothing. Ranks that
share a layer or a sequence share all of this alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_mod.config.lora import TARGETS, LoraSettings
from megatron_mod.model.architecture import Architecture
from megatron_mod.model.reach import FC1, FC2, PLACES, PROJ, QKV, Reach
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.costs import UnitCosts, Workload
from megatron_mod.routing.scheme import EXPERT, Place, Scheme

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

    def backward(self, down_to: int, *, weights: bool) -> float:
        """To the lowest place where something trains: each product with a weight has one of its
        size, and another if ``weights`` train, as those of two activations have."""
        linears = {QKV: self.qkv, PROJ: self.proj, FC1: self.fc1, FC2: self.fc2}
        found = sum(own for place, own in linears.items() if place > down_to)
        return found + sum(linears.values()) * weights + 2 * self.scores * (down_to <= QKV)


class _Adapters(NamedTuple):
    """Forward operations of the adapters on one linear: with their ``A``, and with their ``B``."""

    inner: float
    outer: float

    @property
    def forward(self) -> float:
        return self.inner + self.outer

    def backward(self, *, trains: bool, goes_on: bool) -> float:
        """``goes_on``: something below trains too."""
        return self.forward * trains + self.outer * (trains or goes_on) + self.inner * goes_on


def forward_costs(arch: Architecture, *, length: int = LENGTH) -> Costs:
    """Of a forward pass of the dense model with logits at every token."""
    layer = round(_products(arch, _Text.of(arch, [length]), _Shares()).forward)
    return Costs((layer,) * arch.num_layers, _head(arch, length))


def workload(arch: Architecture, routing: RoutingConfig, lengths: Sequence[int]) -> Workload:
    """What a prefill of documents of these lengths computes, by what a model's places keep of them;
    as ``evaluation/work.py`` counts it, with logits of a document's last token."""
    text, scheme = _Text.of(arch, lengths), routing.scheme
    stand_in = 4 * arch.hidden_size * (routing.stand_in_rank or 0)
    table = []
    for place in routing.places:
        attends, feeds = (place.target in (part, "block") for part in ("attn", "mlp"))
        token = 2 * arch.mlp_weights * feeds
        if attends:
            token += 2 * arch.query_weights
            token += 2 * arch.key_weights * (routing.keys_values != "all")
        unit = 2 * arch.expert_weights * scheme.per_expert
        table.append((unit, token - stand_in, 4 * arch.query_channels * attends))
    units = scheme.units(sequences=len(lengths), tokens=text.tokens, top_k=arch.top_k)
    sizes = (units, text.tokens, text.pairs)
    costs = UnitCosts(tuple(table), among_kept=routing.keys_values == "selected")
    layer = _products(arch, text, _Shares()).forward
    dense = round(arch.num_layers * layer) + _head(arch, len(lengths))
    routers = _router(arch, routing) * text.tokens * len(routing.places)
    saved = sum(cost * size for costs in table for cost, size in zip(costs, sizes, strict=True))
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
    lora: LoraSettings | None = None,
    parts: Sequence[str] = ("routers",),
) -> Costs:
    """Of training on documents of these lengths in tokens, ``labels`` of them labelled together.

    Every layer runs forward; those above the first with something that trains backward too, to
    their inputs, and that one down to what trains in it; where weights train, all do, and to these
    too. The head runs both ways, at labelled tokens. With ``training_compute = sparse`` routed
    layers compute what is kept.

    Args:
        dense_passes: forward passes of the dense model beside it, as a distillation needs.
        num_free_layers: leading layers that are not run at all.
        recompute: what backward computes again (see ``model/recompute.py``).
        kept: the share that each router kept; without, what a training that is held to its
            target keeps on average over the steps.
        lora: the model's adapters.
        parts: what trains (``train.trainable``).
    """
    text, reach = _Text.of(arch, lengths), Reach(routing, lora, parts, recompute)
    dense = _products(arch, text, _Shares())
    kept = [_mean_share(routing, target) for target in routing.capacity] if kept is None else kept
    capacity = dict(zip(routing.places, kept, strict=True))
    width, routers = 2 * text.tokens * arch.hidden_size, len(routing.scheme.targets)
    router = routers * text.tokens * _router(arch, routing)
    stand_in = routers * 2 * width * (routing.stand_in_rank or 0)
    found = []
    for layer in range(arch.num_layers):
        if layer < num_free_layers:
            found.append(0)
            continue
        is_routed = layer in routing.layers
        shares = _shares(arch, routing, layer, capacity, lengths) if is_routed else _Shares()
        own = _products(arch, text, shares)
        adapters = _adapters(arch, lora, text, shares) if lora and layer in lora.layers else {}
        total = own.forward + (router + stand_in) * is_routed + dense_passes * dense.forward
        total += sum(each.forward for each in adapters.values())
        down_to = reach.down_to(layer)
        if down_to is not None:
            if layer > reach.first:
                total += stand_in * is_routed + router * reach.routes(layer)
            total += stand_in * is_routed * ("stand_ins" in parts)
            total += own.backward(down_to, weights=reach.trains_base)
            total += sum(
                each.backward(trains=reach.adapts(layer), goes_on=place > down_to)
                for place, each in adapters.items()
            )
            if recompute == "full":
                total += own.forward + stand_in * is_routed
                total += sum(each.forward for each in adapters.values())
            elif reach.computes_mlp_again(layer):
                total += own.mlp
                total += sum(each.forward for k, each in adapters.items() if k in (FC1, FC2))
        found.append(round(total))
    return Costs(tuple(found), _head(arch, labels) * (2 + reach.trains_base + dense_passes))


def _head(arch: Architecture, tokens: int) -> int:
    return 2 * arch.hidden_size * arch.vocab_size * tokens


def _mean_share(routing: RoutingConfig, target: float) -> float:
    """What is kept on average by a router held to this target once it has fallen there from 1."""
    return target + (1 - target) * routing.capacity_warmup_fraction / 2


class _Shares(NamedTuple):
    """Of a layer's tokens, or pairs of them, that it computes; and of the experts that a token in
    its mixture is sent to."""

    queries: float = 1.0
    keys: float = 1.0
    pairs: float = 1.0
    mlp: float = 1.0
    experts: float = 1.0


def _router(arch: Architecture, routing: RoutingConfig) -> int:
    """Operations of a router on a token, its predictor's with it, or of a gate's no-ops."""
    rows = routing.num_noop_experts or (arch.num_experts if routing.scheme.per_expert else 1)
    predictor = (routing.predictor_size or 0) * (arch.hidden_size + 1)
    return 2 * (rows * arch.hidden_size + predictor)


def _shares(
    arch: Architecture,
    routing: RoutingConfig,
    layer: int,
    capacity: Mapping[Place, float],
    lengths: Sequence[int],
) -> _Shares:
    """Of a routed layer in training whose routers keep such shares."""
    if routing.training_compute == "dense":
        return _Shares()
    if routing.is_exact:
        (place,) = routing.scheme.places(layer)
        return _exact_shares(arch, routing.scheme, capacity[place], lengths)
    scheme = routing.scheme
    if scheme.per_expert:
        return _Shares(experts=capacity[Place(layer, EXPERT)])
    queries, mlp = (
        1.0 if target is None else capacity[Place(layer, target)]
        for target in (scheme.attention_target, scheme.mlp_target)
    )
    keys = 1.0 if routing.keys_values == "all" else queries
    # Of a kept sequence every pair is computed; of kept tokens those of two that are kept.
    pairs = queries if scheme.per_sequence else queries * keys
    return _Shares(queries, keys, pairs, mlp)


def _exact_shares(
    arch: Architecture, scheme: Scheme, capacity: float, lengths: Sequence[int]
) -> _Shares:
    """As ``_shares``, of the tokens that every document keeps, which attend to each other; a window
    is one of the kept tokens', which is at least what they see."""
    whole = _Text.of(arch, lengths)
    kept = _Text.of(arch, [math.floor(capacity * n + 0.5) for n in lengths])
    tokens, pairs = kept.tokens / max(whole.tokens, 1), kept.pairs / max(whole.pairs, 1)
    attends, feeds = scheme.covers_attention, scheme.covers_mlp
    queries = tokens if attends else 1.0
    return _Shares(queries, queries, pairs if attends else 1.0, tokens if feeds else 1.0)


def _products(arch: Architecture, text: _Text, shares: _Shares) -> _Products:
    """Of a layer over documents."""
    width = 2 * text.tokens
    experts = shares.experts * arch.top_k * arch.expert_weights
    queries = shares.queries * arch.query_weights / 2  # of the query's projection, or the output's
    return _Products(
        width * (queries + shares.keys * arch.key_weights),
        4 * arch.query_channels * text.pairs * shares.pairs,
        width * queries,
        width * shares.mlp * (arch.gate_weights + experts * 2 / 3),
        width * shares.mlp * experts / 3,
    )


def _adapters(
    arch: Architecture, lora: LoraSettings, text: _Text, shares: _Shares
) -> dict[int, _Adapters]:
    """Of a layer, by the place of their linear: one product with all ``A`` of a linear, and one
    with their ``B`` for all its outputs."""
    found = {}
    for linear, place in PLACES.items():
        members = [target for target, of in TARGETS.items() if of == linear]
        ranks = lora.rank * sum(target in lora.targets for target in members)
        if not ranks:
            continue
        inputs = arch.projections[members[0]][0]
        outputs = sum(arch.projections[target][1] for target in members)
        inner = outer = shares.mlp if place in (FC1, FC2) else shares.queries
        if place == QKV and shares.queries != shares.keys:  # queries apart from keys and values
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
