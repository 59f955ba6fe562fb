"""Quality against work: routers at several capacities, beside static removal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_mod.calibration.search import Calibration, Point
from megatron_mod.evaluation.rows import Row
from megatron_mod.evaluation.static import METHOD, Greedy, thresholds_without
from megatron_mod.routing.scheme import Place, Scheme

NEAR = 0.02  # what a curve's capacity may differ from the one asked for


@dataclass(frozen=True)
class CurvePoint:
    """A point with the static removal nearest to its work, and what was measured on a device.

    ``static``: ``None`` of exact routers, whose layers were never trained to keep everything.
    ``speedup``, ``static_speedup``: of counted work; ``prefill``, ``decode``: of time, where it was
    measured.
    """

    scheme: Scheme
    point: Point
    speedup: float
    removed: list[Place]
    static: Point | None
    static_speedup: float | None
    prefill: float | None = None
    decode: float | None = None

    @property
    def removed_layers(self) -> list[int | str]:
        """What is removed, as people call it."""
        return list(map(self.scheme.label, self.removed))

    def to_dict(self) -> dict:
        return {
            "capacity": self.point.mean_capacity,
            "capacity_per_layer": list(self.point.capacity),
            "thresholds": list(self.point.thresholds),
            "perplexity": self.point.perplexity,
            "static_method": self.static and METHOD,
            "static_perplexity": self.static and self.static.perplexity,
            "static_removed_layers": self.static and self.removed_layers,
            "static_capacity": self.static and self.static.mean_capacity,
            "static_counted_speedup": self.static_speedup,
            "counted_speedup": self.speedup,
            "work": 1 / self.speedup,
            "prefill_speedup": self.prefill,
            "decode_speedup": self.decode,
        }


class Curve:
    """Makes the points of one calibration's curve.

    Args:
        ranking: what the layers to remove are chosen on; ``None``: the calibration's rows.
        timing: prefill and decode speed-up at the thresholds given; ``None``: not measured.
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        ranking: Sequence[Row] | None = None,
        timing: Callable[[Sequence[float]], tuple[float, float]] | None = None,
    ) -> None:
        self.calibration, self.timing = calibration, timing
        routing = calibration.work.routing
        assert routing is not None
        self.scheme, self.is_exact = routing.scheme, routing.is_exact
        self.removal = Greedy(
            calibration.backend,
            calibration.rows if ranking is None else ranking,
            work=calibration.work,
            after_pass=calibration.after_pass,
        )

    def at(self, point: Point) -> CurvePoint:
        """What belongs to a point of the calibration."""
        calibration, speedup = self.calibration, self.calibration.speedup
        removed: list[Place] = []
        static = static_speedup = None
        if not self.is_exact:
            removed = sorted(self.removal.nearest(calibration.rows, point.flops))
            static = calibration.at(thresholds_without(calibration.backend.places, removed))
            static_speedup = speedup(static)
        times = self.timing(point.thresholds) if self.timing else (None, None)
        return CurvePoint(
            self.scheme, point, speedup(point), removed, static, static_speedup, *times
        )
