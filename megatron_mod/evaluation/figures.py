"""Figures of what was measured, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

ROUTED, STATIC, DENSE = "tab:blue", "tab:orange", "black"


def quality_against_work(
    curve: Sequence[dict], *, dense_perplexity: float, chosen: dict | None = None
) -> Figure:
    """Perplexity over counted work saved: routers, the best static removal, and the dense model.

    ``curve``: points as ``CurvePoint.to_dict`` gives them.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    points = sorted(curve, key=lambda point: point["counted_speedup"])
    speedups = [point["counted_speedup"] for point in points]
    for name, color in (("perplexity", ROUTED), ("static_perplexity", STATIC)):
        label = "routers" if color == ROUTED else "best static removal of the same capacity"
        axes.plot(speedups, [point[name] for point in points], "o-", color=color, label=label)
    axes.axhline(dense_perplexity, color=DENSE, linestyle=":", label="dense")
    if chosen:
        where = (chosen["counted_speedup"], chosen["perplexity"])
        axes.plot(*where, "*", color=ROUTED, markersize=18, label="chosen")
    axes.set_xlabel("speed-up in counted work")
    axes.set_ylabel("perplexity")
    if max(point["static_perplexity"] for point in points) > 5 * dense_perplexity:
        axes.set_yscale("log")
    axes.legend()
    return figure
