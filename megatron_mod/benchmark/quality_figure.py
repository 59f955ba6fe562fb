"""The picture of the quality benchmark: perplexity over counted work."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_mod.routing.scheme import Scheme

COLORS = {
    "attn": "tab:blue", "mlp": "tab:green", "block": "tab:red", "attn+mlp": "tab:purple",
}  # fmt: skip
KINDS = {
    "ours": "trained here", "published": "published recipe", "ours+lora": "with adapters",
    "dense+lora": "none routed, with adapters", "removed+lora": "removed, with adapters",
}  # fmt: skip
ADAPTED = {"ours+lora": "*", "dense+lora": "+", "removed+lora": "x"}
MARKERS = {"token": "o", "sequence": "s"}


def draw(found: dict) -> Figure:
    """A panel a text: routers (means and standard errors over the seeds), removal for good with and
    without stand-ins, the published recipe and the dense model.

    ``found``: what ``quality.compare`` returns.
    """
    texts = list(found["dense"])
    figure = Figure(figsize=(5.5 * len(texts), 5.5), layout="constrained")
    panels = figure.subplots(1, len(texts), squeeze=False)[0]
    for axes, text in zip(panels, texts, strict=True):
        _panel(axes, found, text)
    handles, labels = panels[0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # one entry for all budgets of a granularity
    figure.legend(once.values(), once.keys(), fontsize="small", loc="outside lower center", ncols=3)
    return figure


def _panel(axes: Axes, found: dict, text: str) -> None:
    axes.axhline(found["dense"][text], color="black", linestyle=":", label="dense")
    for target, color in COLORS.items():
        for stand_ins, style in ((False, ":"), (True, "--")):
            points = [
                (one["texts"][text]["work"], one["texts"][text]["perplexity"])
                for one in found["static"]
                if (one["target"], one["stand_ins"]) == (target, stand_ins)
            ]
            if points:
                name = f"{target} removed{', stand-ins' if stand_ins else ''}"
                axes.plot(*zip(*points, strict=True), style, color=color, label=name)
        for row in found["table"]:
            scheme = Scheme.parse(row["granularity"])
            if "+".join(scheme.targets) != target or row["text"] != text:
                continue
            ours, served = row["recipe"] != "published", row["trained_range"]
            kind = KINDS[row["recipe"]] + (" for a range" if served else "")
            axes.errorbar(
                row["work"],
                row["perplexity"],
                yerr=row["perplexity_standard_error"],
                fmt=ADAPTED.get(row["recipe"], "D" if served else MARKERS[scheme.unit]),
                color=color,
                markerfacecolor=color if ours else "none",
                label=f"{row['granularity']}, {kind}",
            )
    found_here = [row["perplexity"] for row in found["table"] if row["text"] == text]
    dense = found["dense"][text]
    axes.set(
        title=text,
        xlabel="counted work, share of the dense model's",
        ylabel="perplexity",
        yscale="log",
        ylim=(0.95 * min(dense, *found_here), min(1.1 * max(found_here), 8 * dense)),
    )
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:g}")
    axes.invert_xaxis()
