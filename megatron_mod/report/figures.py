"""Figures of what was measured, drawn with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_mod.calibration.figure import DENSE, ROUTED, STATIC
from megatron_mod.report.observed import Decisions

SHARE = {"cmap": "viridis", "vmin": 0.0, "vmax": 1.0, "aspect": "auto", "interpolation": "nearest"}


def losses(steps: Sequence[dict], validations: Sequence[dict]) -> Figure:
    """Loss over steps: with the capacity penalty, without it, and on validation data."""
    figure, axes = _figure(height=3.6)
    at = [record["step"] for record in steps]
    axes.plot(at, [r["loss"] for r in steps], color=ROUTED, alpha=0.35, label="loss with penalty")
    axes.plot(at, [record["task_loss"] for record in steps], color=ROUTED, label="task loss")
    if validations:
        at = [record["step"] for record in validations]
        found = [record["validation_loss"] for record in validations]
        axes.plot(at, found, "o-", color=STATIC, label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("nats a labelled token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def capacities(steps: Sequence[dict], labels: Sequence[str], *, target: float | None) -> Figure:
    """Mean capacity over steps, and below it that of every router, which are called ``labels``;
    without a ``target`` of it the work that is held to one."""
    figure = Figure(figsize=(8, 3 + 0.16 * len(labels)), layout="constrained")
    mean, by_layer = figure.subplots(
        2, 1, sharex=True, height_ratios=[2, max(1.5, 0.16 * len(labels))]
    )
    at = [record["step"] for record in steps]
    mean.plot(at, [record["capacity_mean"] for record in steps], color=ROUTED, label="mean")
    if target is None:
        mean.plot(at, [record["work"] for record in steps], color=STATIC, label="work")
        targets = [record["work_target"] for record in steps]
        mean.plot(at, targets, color=DENSE, linestyle=":", label="target of work")
    else:
        mean.axhline(target, color=DENSE, linestyle=":", label="target")
    mean.set_ylim(-0.03, 1.03)
    mean.set_ylabel("capacity")
    mean.legend()
    edges = _edges(at)
    shares = np.array([record["capacity"] for record in steps]).T
    image = by_layer.pcolormesh(
        edges, np.arange(len(labels) + 1), shares, cmap="viridis", vmin=0, vmax=1
    )
    _name_layers(by_layer, labels, offset=0.5)
    by_layer.set_xlabel("step")
    by_layer.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=by_layer, label="capacity")
    return figure


def decisions(found: Decisions) -> Figure:
    """Which document keeps how much of each layer."""
    figure, axes = _figure(height=1.8 + 0.17 * len(found.labels))
    image = axes.imshow(found.shares.numpy(), origin="lower", **SHARE)
    _name_layers(axes, found.labels, offset=0)
    axes.set_xlabel("document")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label="kept")
    return figure


def scores(found: Decisions) -> Figure:
    """Each layer's histogram of logits, and the border from which on a unit is kept."""
    columns = min(5, len(found.labels))
    rows = math.ceil(len(found.labels) / columns)
    figure = Figure(figsize=(8, 1.2 + 1.35 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(found.labels) :]:
        axes.set_visible(False)
    routers = zip(found.labels, found.logits, found.borders, strict=True)
    for axes, (label, logits, border) in zip(grid, routers, strict=False):
        axes.hist(logits.numpy(), bins=40, color=ROUTED)
        if math.isfinite(border):
            axes.axvline(border, color=STATIC)
        axes.set_title(f"layer {label}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    figure.supxlabel("logit")
    return figure


def experts(found: Sequence[dict]) -> Figure:
    """Tokens that each expert of every layer is sent, and those of them that it computes, before
    (left) and after."""
    layers = sorted({entry["layer"] for entry in found})
    figure = Figure(figsize=(8, 1 + 1.4 * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), 2, sharex=True, sharey="row", squeeze=False)
    for row, layer in zip(grid, layers, strict=True):
        own = [entry for entry in found if entry["layer"] == layer]
        at = [entry["expert"] for entry in own]
        for axes, when in zip(row, ("_before", ""), strict=True):
            for name, colour in (("assigned", "0.75"), ("executed", ROUTED)):
                axes.bar(at, [entry[name + when] for entry in own], color=colour, label=name)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.tick_params(labelsize=7)
        row[0].set_ylabel(f"layer {layer}", fontsize=9)
    for axes, title in zip(grid[0], ("dense", "routed"), strict=True):
        axes.set_title(title, fontsize=9)
    grid[0][1].legend(fontsize=7)
    figure.supxlabel("expert")
    figure.supylabel("tokens")
    return figure


def _figure(*, height: float) -> tuple[Figure, object]:
    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.add_subplot()


def _edges(at: Sequence[int]) -> np.ndarray:
    """Borders of the cells around steps that need not be evenly spaced."""
    middles = (np.array(at[:-1]) + np.array(at[1:])) / 2
    first = at[0] - (middles[0] - at[0] if len(at) > 1 else 0.5)
    last = at[-1] + (at[-1] - middles[-1] if len(at) > 1 else 0.5)
    return np.array([first, *middles, last])


def _name_layers(axes, labels: Sequence[str], *, offset: float) -> None:
    every = math.ceil(len(labels) / 20)
    rows = np.arange(0, len(labels), every)
    axes.set_yticks(rows + offset, [labels[row] for row in rows])
    axes.set_ylabel("layer")
