"""The picture of a calibration: quality against work."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from megatron_mod.evaluation.static import METHOD

ALL_KEPT = "all kept"  # of a model that was never trained to keep everything
ROUTED, STATIC, DENSE = "tab:blue", "tab:orange", "black"


def quality_against_work(
    curve: Sequence[dict], *, dense_perplexity: float, chosen: dict, name: str = "chosen"
) -> Figure:
    """Perplexity over counted work saved: routers, static removal where there is any, and the model
    that computes everything.

    ``curve``, ``chosen``: points as ``CurvePoint.to_dict`` gives them.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    points = [*curve, chosen]
    shown = [("", ROUTED, "routers"), ("static_", STATIC, f"static removal ({METHOD})")]
    has_static = chosen["static_perplexity"] is not None
    for prefix, color, label in shown if has_static else shown[:1]:
        pairs = [(one[f"{prefix}counted_speedup"], one[f"{prefix}perplexity"]) for one in points]
        axes.plot(*zip(*sorted(pairs), strict=True), "o-", color=color, label=label)
    axes.axhline(
        dense_perplexity, color=DENSE, linestyle=":", label="dense" if has_static else ALL_KEPT
    )
    where = (chosen["counted_speedup"], chosen["perplexity"])
    axes.plot(*where, "*", color=ROUTED, markersize=18, label=name)
    axes.set_xlabel("speed-up in counted work")
    axes.set_ylabel("perplexity")
    if axes.get_ylim()[1] > 5 * dense_perplexity:
        axes.set_yscale("log")
    axes.legend()
    return figure
