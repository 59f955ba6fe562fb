"""The picture of models from scratch at equal training FLOPs: loss over a forward pass's."""

from __future__ import annotations

from matplotlib.figure import Figure

COLORS = {
    "dense": "black", "static": "tab:gray", "mod": "tab:red", "random": "tab:blue",
    "moe": "tab:green", "mode_staged": "tab:orange", "mode_integrated": "tab:purple",
}  # fmt: skip
MARKERS = {1.0: "o", 0.0: "x", 0.125: "s", 0.5: "^"}


def draw(found: dict) -> Figure:
    """A line for each kind over the sizes, means and standard errors over the seeds; dashed by the
    causal rule.

    ``found``: what ``isoflop.compare`` returns.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, float], list[dict]] = {}
    for row in found["table"]:
        lines.setdefault((row["kind"], row["capacity"]), []).append(row)
    for (kind, capacity), rows in lines.items():
        rows = sorted(rows, key=lambda row: row["forward_flops"])
        flops = [row["forward_flops"] for row in rows]
        name = f"{kind} {capacity:g}" if 0 < capacity < 1 else kind
        color, marker = COLORS[kind], MARKERS.get(capacity, "D")
        errors = [row["standard_error"] or 0.0 for row in rows]
        losses = [row["loss_top_k"] for row in rows]
        axes.errorbar(flops, losses, yerr=errors, label=name, color=color, marker=marker)
        causal = [row["loss_causal"] for row in rows]
        if None not in (row["agreement"] for row in rows):  # there is a causal rule
            axes.plot(
                flops,
                causal,
                "--",
                label=f"{name}, causal",
                color=color,
                marker=marker,
                markerfacecolor="none",
            )
    settings = found["settings"]
    axes.set(
        title=f"{settings['budget']:.3g} training FLOPs each",
        xlabel=f"FLOPs of a forward pass of {settings['length']} tokens",
        ylabel="loss on held-out text, nats a token",
        xscale="log",
    )
    axes.legend(fontsize="small")
    return figure
