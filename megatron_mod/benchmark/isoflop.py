"""Mixture-of-Depths from scratch beside dense models at equal training FLOPs (as figure 3 of arXiv
2404.02258), and beside its controls: tokens drawn by lot, and the same blocks left out; with
mixtures of experts too (MoDE, as its figure 7)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean, stdev

from megatron_mod.benchmark.isoflop_figure import draw
from megatron_mod.benchmark.isoflop_models import (
    DENSE,
    RANDOM,
    STATIC,
    VARIANTS,
    Entry,
    Setup,
    found_in,
)
from megatron_mod.benchmark.isoflop_sampling import time_sampling
from megatron_mod.benchmark.quality_models import Measurements
from megatron_mod.checkpoint.folders import remove, write_durably
from megatron_mod.config.model_size import ModelSize

FOUND = "isoflop.json"


def compare(
    setup: Setup,
    *,
    kinds: Sequence[str],
    sizes: Sequence[ModelSize],
    seeds: Sequence[int],
    sampling: bool,
) -> dict:
    """Train and measure everything, print a table, write ``isoflop.json`` and ``isoflop.png``.

    Args:
        kinds: of models, ``DENSE`` among them.
        seeds: of which every training is repeated.
        sampling: whether generation is timed, of the models of the first seed.
    """
    tokenizer = setup.tokenizer
    measured = Measurements(setup.out / "measured.json")
    variants = [variant for variant in VARIANTS if variant.kind in kinds]
    timed = [variant for variant in variants if variant.kind not in (RANDOM, STATIC)]
    entries = [Entry(v, size, seed) for seed in seeds for size in sizes for v in variants]
    models = []
    for number, entry in enumerate(entries, start=1):
        print(f"{number}/{len(entries)}  {entry}: {setup.steps(entry)} steps", flush=True)
        found = measured.once(setup.key(entry), partial(_measure, setup, entry))
        models.append({**setup.describe(entry), **found})
        if not (sampling and entry.seed == seeds[0] and entry.variant in timed):
            _drop(setup, entry)
    settings = {
        **{name: value for name, value in asdict(setup).items() if name != "out"},
        "text": str(setup.text) if setup.text else None,
        "tokenizer": tokenizer.name,
        "sizes": list(map(str, sizes)),
        "seeds": list(seeds),
    }
    found = {"settings": settings, "models": models, "table": list(summarise(models))}
    if sampling:
        found["sampling"] = [
            row
            for size in sizes
            for row in _sample(setup, measured, [Entry(v, size, seeds[0]) for v in timed])
        ]
    write_durably(setup.out / FOUND, json.dumps(found, indent=1) + "\n")
    draw(found).savefig(setup.out / "isoflop.png", dpi=150)
    print_table(found)
    return found


def _measure(setup: Setup, entry: Entry) -> dict:
    return found_in(setup.run(entry), entry.variant.kind)


def _drop(setup: Setup, entry: Entry) -> None:
    """Remove a training whose measurements are kept."""
    folder = setup.folder(entry)
    if folder.is_dir():
        remove(folder)


def _sample(setup: Setup, measured: Measurements, entries: Sequence[Entry]) -> list[dict]:
    """Tokens a second of exports, one a row."""
    key = " ".join(["sampling", *map(setup.key, entries)])
    found = measured.once(key, lambda: {"rows": time_sampling(setup, entries)})
    return found["rows"]


def summarise(models: Sequence[dict]) -> Iterator[dict]:
    """A row for each kind and size: means over the seeds, and the standard error of the loss."""
    groups: dict[tuple, list[dict]] = {}
    for model in models:
        groups.setdefault((model["kind"], model["capacity"], model["size"]), []).append(model)
    for same in groups.values():
        losses = [model["loss_top_k"] for model in same]
        row = {name: same[0][name] for name in ("kind", "capacity", "size", "steps", "parameters")}
        yield {
            **row,
            "seeds": len(same),
            "train_flops": same[0]["train_flops"],
            "forward_flops": same[0]["forward_flops"],
            "loss_top_k": fmean(losses),
            "standard_error": stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None,
            "loss_causal": _mean([model["loss_causal"] for model in same]),
            "agreement": _mean([model["agreement"] for model in same]),
            "kept": fmean(model["kept"] for model in same),
            "step_s": fmean(model["step_s"] for model in same),
        }


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def print_table(found: dict) -> None:
    """What was found, as Markdown."""
    table = found["table"]
    best = min((r for r in table if r["kind"] == DENSE), key=lambda row: row["loss_top_k"])
    print(
        "\n| model | size | parameters | steps | training FLOPs | forward pass, of the best dense"
        " model's | kept | loss | causal loss | agreement | steps a second |\n"
        + "| --- " * 11
        + "|"
    )
    for row in table:
        spread = "" if row["standard_error"] is None else f" ± {row['standard_error']:.3f}"
        name = row["kind"] if row["capacity"] in (0, 1) else f"{row['kind']} {row['capacity']:g}"
        causal, agreement = (
            "-" if row[key] is None else f"{row[key]:.3f}" for key in ("loss_causal", "agreement")
        )
        print(
            f"| {name} | {row['size']} | {row['parameters']} | {row['steps']} |"
            f" {row['train_flops']:.3g} | {row['forward_flops'] / best['forward_flops']:.2f} |"
            f" {row['kept']:.2f} | {row['loss_top_k']:.3f}{spread} | {causal} | {agreement} |"
            f" {1 / row['step_s']:.2f} |"
        )
    for row in found.get("sampling", ()):
        print(f"{row['kind']} {row['capacity']:g} {row['size']}: "
              f"{row['tokens_per_second']:.1f} tokens/s")  # fmt: skip
