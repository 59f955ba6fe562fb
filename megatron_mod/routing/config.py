"""A router's settings as the model, the checkpoint and the export share them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

GRANULARITIES = ("attn_sequence",)
POOLINGS = ("all", "prompt")
SCOPES = ("layer", "model")


@dataclass(frozen=True)
class RoutingConfig:
    """Which layers carry a router and how it decides.

    ``layers`` are global, zero-based layer indices in ascending order; ``capacity``
    holds one target per routed layer, in that order.
    """

    granularity: str
    layers: tuple[int, ...]
    capacity: tuple[float, ...]
    scope: str = "model"
    capacity_loss_weight: float = 1.0
    threshold: float = 0.5
    pooling: str | None = "prompt"
    keys_values: str | None = None
    training_compute: str = "dense"

    @property
    def logit_border(self) -> float:
        """``log(t / (1 - t))``: a unit is kept when its logit is at least this."""
        return math.log(self.threshold / (1.0 - self.threshold))

    def to_dict(self) -> dict:
        """JSON form; ``from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> RoutingConfig:
        return cls(
            **{**values, "layers": tuple(values["layers"]), "capacity": tuple(values["capacity"])}
        )


def resolve_layers(layers: dict[str, int] | list[int], *, num_layers: int) -> tuple[int, ...]:
    """Turn ``{'deepest': n}`` or a list into ascending layer indices.

    The ``n`` deepest leave out the last layer, as published: indices
    ``num_layers - n - 1 .. num_layers - 2``.

    Raises:
        ValueError: an index out of range, twice the same one, none at all, or an unknown rule.
    """
    if isinstance(layers, dict):
        if set(layers) != {"deepest"}:
            raise ValueError(
                f"router.layers = {layers}: the only rule is 'deepest: n'; "
                "write that, or a list of layer indices."
            )
        n = layers["deepest"]
        if not 1 <= n <= num_layers - 1:
            raise ValueError(
                f"router.layers.deepest = {n}: this model has {num_layers} layers and the last is "
                f"never counted among the deepest; use 1 to {num_layers - 1}."
            )
        return tuple(range(num_layers - n - 1, num_layers - 1))
    if not layers:
        raise ValueError("router.layers = []: name at least one layer, or use 'deepest: n'.")
    bad = [i for i in layers if not 0 <= i < num_layers]
    if bad:
        raise ValueError(
            f"router.layers: {bad} out of range; this model has layers 0 to {num_layers - 1}."
        )
    if len(set(layers)) != len(layers):
        raise ValueError(f"router.layers = {list(layers)}: a layer is named twice.")
    return tuple(sorted(layers))


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
                "sequences that keeps a routed layer)."
            )
    return values
