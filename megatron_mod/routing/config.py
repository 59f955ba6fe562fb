"""A router's settings as the model, the checkpoint and the export share them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from megatron_mod.routing.scheme import Place, Scheme

AUTO = "auto"
Layers: TypeAlias = Literal["all"] | dict[str, int] | list[int]  # as ``resolve_layers`` reads them
KNOTS = 5  # budgets of a range, evenly spaced, that borders are set at
# What a routed layer has beside a dense one.
ROUTER, STAND_IN, PREDICTOR, NOOP_GATE = "router", "stand_in", "predictor", "noop_gate"


@dataclass(frozen=True)
class RoutingConfig:
    """Which layers carry a router, what it decides on and how.

    ``layers`` are global, zero-based layer indices in ascending order; ``capacity``
    holds one target per router, in the order of ``places``: one for each layer, or one for its
    attention and one for its MLP. ``pooling`` belongs to sequence
    granularities only (default ``prompt``), ``keys_values`` to token-routed attention only
    (``attn_token``, with ``mlp_token`` or without, and ``block_token``, default ``all``); elsewhere
    they are ``None``. ``threshold`` is one number or, once calibrated, one per router; 0 keeps and
    1 skips everything. ``stand_in_rank`` is that of what skipped units add, ``None`` if
    they add nothing. ``work``: the share of the dense model's operations that all places together
    are held to in place of ``capacity``, which is then what each of them was found to keep; or the
    least and the most of a range of them, of which ``budget`` is the one that is set (at first the
    least), with ``capacity`` what is kept at the least.

    ``selection``: ``threshold`` keeps what reaches the threshold; ``top_k`` and ``random`` keep
    exactly ``capacity`` of every document's tokens, with the largest logits or by lot, and multiply
    their update by the logit. ``causal``: with ``top_k``, what decides where later tokens are not
    known, by ``threshold``: a ``predictor`` of hidden size ``predictor_size``, or the router, whose
    logits an ``auxiliary_loss`` of weight ``causal_loss_weight`` draws there.

    ``renormalize``, of experts' routers: the weights that the gate gave the experts that compute a
    token are scaled to the sum of what it gave all of the token's. ``num_noop_experts``: in the
    place of routers on experts, so many more that the gate chooses among, and that return nothing;
    ``capacity`` is then what a gate that favours none sends to the others.

    Raises:
        ValueError: an unknown granularity, or a setting that this granularity would ignore.
    """

    granularity: str
    layers: tuple[int, ...]
    capacity: tuple[float, ...]
    scope: str = "model"
    capacity_loss_weight: float | str = 1.0
    capacity_warmup_fraction: float = 0.0
    threshold: float | tuple[float, ...] = 0.5
    pooling: str | None = None
    keys_values: str | None = None
    training_compute: str = "dense"
    bias: bool = False
    stand_in_rank: int | None = None
    work: float | tuple[float, float] | None = None
    budget: float | None = None
    selection: str = "threshold"
    causal: str | None = None
    causal_loss_weight: float | None = None
    predictor_size: int | None = None
    renormalize: bool = False
    num_noop_experts: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.work, tuple) and self.budget is None:
            object.__setattr__(self, "budget", self.work[0])
        scheme = self.scheme
        self._own("pooling", scheme.per_sequence, "prompt", "a sequence granularity")
        where = "attn_token, attn_token+mlp_token or block_token"
        self._own("keys_values", scheme.chooses_keys, "selected" if self.is_exact else "all", where)
        if self.renormalize:
            self._own("renormalize", scheme.per_expert, True, "expert_token")
        if self.num_noop_experts:
            self._own("num_noop_experts", scheme.per_expert, None, "expert_token")
        if scheme.per_expert and (self.is_exact or self.stand_in_rank or self.budgets):
            raise ValueError(
                f"router.granularity = {self.granularity}: experts' routers decide by thresholds "
                "for one budget, and have no stand-ins."
            )

    def _own(self, name: str, belongs: bool, default: object, where: str) -> None:
        """Give a setting its default where it belongs and refuse it elsewhere."""
        value = getattr(self, name)
        if belongs:
            object.__setattr__(self, name, value or default)
        elif value is not None:
            raise ValueError(
                f"router.{name} = {value!r}: has no meaning for router.granularity = "
                f"{self.granularity!r}; leave it out, or choose {where}."
            )

    @cached_property
    def scheme(self) -> Scheme:
        """What ``granularity`` says."""
        return Scheme.parse(self.granularity)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Of the routers, in the order of ``capacity`` and ``thresholds``."""
        return tuple(place for layer in self.layers for place in self.scheme.places(layer))

    @property
    def is_exact(self) -> bool:
        """Whether every document keeps a number of tokens that follows from its length, and their
        update is multiplied by their logits."""
        return self.selection != "threshold"

    @property
    def causal_weight(self) -> float:
        """What the causal loss is multiplied by: of a predictor, which nothing else hears of, by
        one."""
        return self.causal_loss_weight or 1.0

    @property
    def budgets(self) -> tuple[float, float] | None:
        """The least and the most of the budgets of work that routers serve; ``None``: they serve
        one, or a capacity."""
        return self.work if isinstance(self.work, tuple) else None

    @property
    def least_work(self) -> float | None:
        """The budget of work, the least of several; ``None``: a capacity is held."""
        return self.work[0] if isinstance(self.work, tuple) else self.work

    def position(self, work: float) -> float:
        """Where a budget lies in the range of those that are served, from 0 to 1."""
        assert self.budgets is not None
        low, high = self.budgets
        return (work - low) / (high - low)

    @property
    def labels(self) -> list[str]:
        """What ``places`` are called, in their order."""
        return [str(self.scheme.label(place)) for place in self.places]

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One per router, in the order of ``places``."""
        if isinstance(self.threshold, tuple):
            return self.threshold
        return (self.threshold,) * len(self.places)

    @property
    def added_names(self) -> tuple[str, ...]:
        """Those of ``added_shapes``."""
        return tuple(self.added_shapes(1, num_experts=1))

    def added_shapes(self, hidden_size: int, *, num_experts: int) -> dict[str, tuple[int, ...]]:
        """What a routed layer has beside a dense one: shapes of tensors, by their names in it.

        ``num_experts``: of a layer, on each of which there may be a router.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        if self.num_noop_experts:
            return {f"{NOOP_GATE}.weight": (self.num_noop_experts, hidden_size)}
        rows = num_experts if self.scheme.per_expert else 1
        for target in self.scheme.targets:
            router, stand_in = self.name_of(ROUTER, target), self.name_of(STAND_IN, target)
            shapes[f"{router}.weight"] = (rows, hidden_size)
            if self.bias:
                shapes[f"{router}.bias"] = (rows,)
            if self.budgets:
                shapes[f"{router}.work_weight"] = (1, hidden_size)
                shapes[f"{router}.borders"] = (KNOTS,)
            if size := self.predictor_size:
                predictor = self.name_of(PREDICTOR, target)
                shapes[f"{predictor}.hidden.weight"] = (size, hidden_size)
                shapes[f"{predictor}.hidden.bias"] = (size,)
                shapes[f"{predictor}.out.weight"] = (1, size)
                shapes[f"{predictor}.out.bias"] = (1,)
            if rank := self.stand_in_rank:
                shapes[f"{stand_in}.down.weight"] = (rank, hidden_size)
                shapes[f"{stand_in}.up.weight"] = (hidden_size, rank)
                shapes[f"{stand_in}.up.bias"] = (hidden_size,)
        return shapes

    def name_of(self, what: str, target: str) -> str:
        """The name in a routed layer of a target's ``ROUTER``, ``STAND_IN`` or ``PREDICTOR``, which
        stands for all of the layer where there is one target."""
        return what if len(self.scheme.targets) == 1 else f"{what}.{target}"

    def capacity_of(self, place: Place) -> float:
        """A router's target."""
        return self.capacity[self.places.index(place)]

    def capacities_at(self, progress: float) -> dict[Place, float]:
        """The shares that are kept exactly once a share ``progress`` of a training's steps is done:
        all at first, fewer with every step of the warm-up."""
        warmup = self.capacity_warmup_fraction
        done = min(progress / warmup, 1.0) if warmup else 1.0
        return {
            place: target if done == 1.0 else 1.0 + (target - 1.0) * done
            for place, target in zip(self.places, self.capacity, strict=True)
        }

    def logit_border(self, place: Place) -> float:
        """A router's: a unit is kept when its logit is at least this."""
        return logit_border(self.thresholds[self.places.index(place)])

    def to_dict(self) -> dict:
        """JSON form; ``from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> RoutingConfig:
        lists = ("layers", "capacity", "threshold", "work")
        return cls(
            **{k: tuple(v) if k in lists and isinstance(v, list) else v for k, v in values.items()}
        )


NO_ROUTERS = RoutingConfig("attn_token", (), (), capacity_loss_weight=AUTO)


def logit_border(threshold: float) -> float:
    """``log(t / (1 - t))``: the logit whose sigmoid is the threshold."""
    if threshold in (0.0, 1.0):
        return math.inf if threshold else -math.inf
    return math.log(threshold / (1.0 - threshold))


def default_rank(scheme: Scheme, *, hidden_size: int) -> int:
    """The rank that stand-ins get where none is given."""
    return min(64 if scheme.covers_mlp else 32, hidden_size // 2)


def predictor_size(hidden_size: int) -> int:
    """Hidden units of the predictors of a model's layers."""
    return min(128, max(1, hidden_size // 4))


def resolve_layers(
    layers: Layers, *, num_layers: int, field: str = "router.layers"
) -> tuple[int, ...]:
    """Turn a rule or a list into ascending layer indices.

    ``'all'``: every one. ``{'deepest': n}``: the ``n`` deepest but the last, as published: indices
    ``num_layers - n - 1 .. num_layers - 2``. ``{'every': n, 'offset': k}``: every ``n``-th layer
    from index ``k`` on (default ``n - 1``, so that ``every: 2`` is the second, fourth, ...).

    Raises:
        ValueError: naming ``field``: an index out of range, twice the same one, none at all, or an
            unknown rule.
    """
    if layers == "all":
        return tuple(range(num_layers))
    if isinstance(layers, dict):
        return _by_rule(layers, num_layers=num_layers, field=field)
    if not layers:
        raise ValueError(f"{field} = []: name at least one layer, or use 'deepest: n' or 'all'.")
    bad = [i for i in layers if not 0 <= i < num_layers]
    if bad:
        raise ValueError(
            f"{field}: {bad} out of range; this model has layers 0 to {num_layers - 1}."
        )
    if len(set(layers)) != len(layers):
        raise ValueError(f"{field} = {list(layers)}: a layer is named twice.")
    return tuple(sorted(layers))


def _by_rule(rule: dict[str, int], *, num_layers: int, field: str) -> tuple[int, ...]:
    if set(rule) == {"deepest"}:
        n = rule["deepest"]
        if not 1 <= n <= num_layers - 1:
            raise ValueError(
                f"{field}.deepest = {n}: this model has {num_layers} layers and the last is "
                f"never counted among the deepest; use 1 to {num_layers - 1}."
            )
        return tuple(range(num_layers - n - 1, num_layers - 1))
    if "every" not in rule or set(rule) - {"every", "offset"}:
        raise ValueError(
            f"{field} = {rule}: the rules are 'all', 'deepest: n' and 'every: n' with an "
            "optional 'offset: k'; write one of them, or a list of layer indices."
        )
    n = rule["every"]
    if not 1 <= n <= num_layers:
        raise ValueError(f"{field}.every = {n}: must be 1 to {num_layers}.")
    offset = rule.get("offset", n - 1)
    if not 0 <= offset < num_layers:
        raise ValueError(
            f"{field}.offset = {offset}: the first of them; must be 0 to {num_layers - 1}."
        )
    return tuple(range(offset, num_layers, n))


def resolve_capacity(
    capacity: float | list[float], *, num_layers: int, targets: int = 1
) -> tuple[float, ...]:
    """One target per router, ``targets`` of them in each of the routed layers, from one number for
    all or a list.

    Raises:
        ValueError: a list of another length, or a value outside (0, 1].
    """
    wanted = num_layers * targets
    values = tuple(capacity) if isinstance(capacity, (list, tuple)) else (capacity,) * wanted
    if len(values) != wanted:
        each = (
            "one per routed layer"
            if targets == 1
            else "two per routed layer, its attention's first"
        )
        raise ValueError(
            f"router.capacity has {len(values)} values, but router.layers routes {num_layers} "
            f"layers; give one number, or {each}."
        )
    for value in values:
        if not 0.0 < value <= 1.0:
            raise ValueError(
                f"router.capacity = {value}: must be above 0 and at most 1 (the share of "
                "units that keeps a routed layer)."
            )
    return values
