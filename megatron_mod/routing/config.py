"""A router's settings as the model, the checkpoint and the export share them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from megatron_mod.routing.scheme import Place, Scheme

AUTO = "auto"
Layers: TypeAlias = Literal["all"] | dict[str, int] | list[int]  # as ``resolve_layers`` reads them


@dataclass(frozen=True)
class RoutingConfig:
    """Which layers carry a router, what it decides on and how.

    ``layers`` are global, zero-based layer indices in ascending order; ``capacity``
    holds one target per routed layer, in that order. ``pooling`` belongs to sequence
    granularities only (default ``prompt``), ``keys_values`` to token-routed attention only
    (``attn_token`` and ``block_token``, default ``all``); elsewhere they are ``None``.
    ``threshold`` is one number or, once calibrated, one per routed layer; 0 keeps and 1 skips
    everything. ``stand_in_rank`` is that of what skipped units add, ``None`` if they add nothing.
    ``work``: the share of the dense model's operations that all places together are held to in
    place of ``capacity``, which is then what each of them was found to keep.

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
    work: float | None = None

    def __post_init__(self) -> None:
        scheme = self.scheme
        self._own("pooling", scheme.per_sequence, "prompt", "a sequence granularity")
        self._own("keys_values", scheme.chooses_keys, "all", "attn_token or block_token")

    def _own(self, name: str, belongs: bool, default: str, where: str) -> None:
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
        return tuple(Place(layer, self.scheme.target) for layer in self.layers)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One per routed layer."""
        if isinstance(self.threshold, tuple):
            return self.threshold
        return (self.threshold,) * len(self.layers)

    def added_shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """What a routed layer has beside a dense one: shapes of tensors, by their names in it."""
        shapes: dict[str, tuple[int, ...]] = {"router.weight": (1, hidden_size)}
        if self.bias:
            shapes["router.bias"] = (1,)
        if rank := self.stand_in_rank:
            shapes["stand_in.down.weight"] = (rank, hidden_size)
            shapes["stand_in.up.weight"] = (hidden_size, rank)
            shapes["stand_in.up.bias"] = (hidden_size,)
        return shapes

    def logit_border(self, layer: int) -> float:
        """A layer's: a unit is kept when its logit is at least this."""
        threshold = self.thresholds[self.layers.index(layer)]
        return logit_border(threshold)

    def to_dict(self) -> dict:
        """JSON form; ``from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> RoutingConfig:
        lists = ("layers", "capacity", "threshold")
        return cls(
            **{k: tuple(v) if k in lists and isinstance(v, list) else v for k, v in values.items()}
        )


def logit_border(threshold: float) -> float:
    """``log(t / (1 - t))``: the logit whose sigmoid is the threshold."""
    if threshold in (0.0, 1.0):
        return math.inf if threshold else -math.inf
    return math.log(threshold / (1.0 - threshold))


def default_rank(target: str, *, hidden_size: int) -> int:
    """The rank that a target's stand-in gets where none is given."""
    return min(32 if target == "attn" else 64, hidden_size // 2)


def resolve_layers(layers: Layers, *, num_layers: int) -> tuple[int, ...]:
    """Turn a rule or a list into ascending layer indices.

    ``'all'``: every one. ``{'deepest': n}``: the ``n`` deepest but the last, as published: indices
    ``num_layers - n - 1 .. num_layers - 2``. ``{'every': n, 'offset': k}``: every ``n``-th layer
    from index ``k`` on (default ``n - 1``, so that ``every: 2`` is the second, fourth, ...).

    Raises:
        ValueError: an index out of range, twice the same one, none at all, or an unknown rule.
    """
    if layers == "all":
        return tuple(range(num_layers))
    if isinstance(layers, dict):
        return _by_rule(layers, num_layers=num_layers)
    if not layers:
        raise ValueError(
            "router.layers = []: name at least one layer, or use 'deepest: n' or 'all'."
        )
    bad = [i for i in layers if not 0 <= i < num_layers]
    if bad:
        raise ValueError(
            f"router.layers: {bad} out of range; this model has layers 0 to {num_layers - 1}."
        )
    if len(set(layers)) != len(layers):
        raise ValueError(f"router.layers = {list(layers)}: a layer is named twice.")
    return tuple(sorted(layers))


def _by_rule(rule: dict[str, int], *, num_layers: int) -> tuple[int, ...]:
    if set(rule) == {"deepest"}:
        n = rule["deepest"]
        if not 1 <= n <= num_layers - 1:
            raise ValueError(
                f"router.layers.deepest = {n}: this model has {num_layers} layers and the last is "
                f"never counted among the deepest; use 1 to {num_layers - 1}."
            )
        return tuple(range(num_layers - n - 1, num_layers - 1))
    if "every" not in rule or set(rule) - {"every", "offset"}:
        raise ValueError(
            f"router.layers = {rule}: the rules are 'all', 'deepest: n' and 'every: n' with an "
            "optional 'offset: k'; write one of them, or a list of layer indices."
        )
    n = rule["every"]
    if not 1 <= n <= num_layers:
        raise ValueError(f"router.layers.every = {n}: must be 1 to {num_layers}.")
    offset = rule.get("offset", n - 1)
    if not 0 <= offset < num_layers:
        raise ValueError(
            f"router.layers.offset = {offset}: the first routed layer; must be 0 to "
            f"{num_layers - 1}."
        )
    return tuple(range(offset, num_layers, n))


def resolve_capacity(capacity: float | list[float], *, num_routed: int) -> tuple[float, ...]:
    """One target per routed layer from one number for all or a list.

    Raises:
        ValueError: a list of another length than the routed layers, or a value outside (0, 1].
    """
    values = tuple(capacity) if isinstance(capacity, (list, tuple)) else (capacity,) * num_routed
    if len(values) != num_routed:
        raise ValueError(
            f"router.capacity has {len(values)} values, but router.layers routes {num_routed} "
            "layers; give one number, or one per routed layer."
        )
    for value in values:
        if not 0.0 < value <= 1.0:
            raise ValueError(
                f"router.capacity = {value}: must be above 0 and at most 1 (the share of "
                "units that keeps a routed layer)."
            )
    return values
