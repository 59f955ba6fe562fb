"""Quality against work: routers at several capacities, beside the best static removal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_mod.evaluation.calibration import Calibration, Point
from megatron_mod.evaluation.static import removed_layers

NEAR = 0.02  # what a curve's capacity may differ from the one asked for


@dataclass(frozen=True)
class CurvePoint:
    """A point with the static removal of the same capacity, and what was measured on a device.

    ``speedup``, ``static_speedup``: of counted work; ``prefill``, ``decode``: of time, where it was
    measured.
    """

    point: Point
    speedup: float
    removed: list[int]
    static: Point
    static_speedup: float
    prefill: float | None = None
    decode: float | None = None

    def to_dict(self) -> dict:
        return {
            "capacity": self.point.mean_capacity,
            "capacity_per_layer": list(self.point.capacity),
            "thresholds": list(self.point.thresholds),
            "perplexity": self.point.perplexity,
            "static_perplexity": self.static.perplexity,
            "static_removed_layers": self.removed,
            "static_counted_speedup": self.static_speedup,
            "counted_speedup": self.speedup,
            "prefill_speedup": self.prefill,
            "decode_speedup": self.decode,
        }


class Curve:
    """Makes the points of one calibration's curve.

    A layer is removed for good by the threshold 1, so the static baseline runs on whatever the
    routed model runs on.

    Args:
        timing: prefill and decode speed-up at the thresholds given; ``None``: not measured.
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        timing: Callable[[Sequence[float]], tuple[float, float]] | None = None,
    ) -> None:
        self.calibration, self.timing = calibration, timing
        layers = calibration.backend.layers
        self.importance = {
            layer: self._without([layer]).nats - calibration.dense.nats for layer in layers
        }

    def at(self, point: Point) -> CurvePoint:
        """What belongs to a point of the calibration."""
        removed = removed_layers(self.importance, capacity=point.mean_capacity)
        times = self.timing(point.thresholds) if self.timing else (None, None)
        static = self._without(removed)
        speedup = self.calibration.speedup
        return CurvePoint(point, speedup(point), removed, static, speedup(static), *times)

    def _without(self, removed: Sequence[int]) -> Point:
        layers = self.calibration.backend.layers
        return self.calibration.at([1.0 if layer in removed else 0.0 for layer in layers])
