"""One calibration from request to files: observe, find the budget's point, show the curve."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from megatron_mod.calibration.budget import find
from megatron_mod.calibration.curve import NEAR, Curve, CurvePoint
from megatron_mod.calibration.export_timing import ExportTiming
from megatron_mod.calibration.figure import ALL_KEPT, quality_against_work
from megatron_mod.calibration.routed import Routed, load_routed
from megatron_mod.calibration.search import Calibration
from megatron_mod.calibration.thresholds_file import write_thresholds
from megatron_mod.config.budget import BudgetRequest
from megatron_mod.config.evaluation import TEXT_LENGTH
from megatron_mod.config.model_folder import is_megatron
from megatron_mod.evaluation.perplexity import holds_conversations, read_rows
from megatron_mod.evaluation.rows import Row, evenly
from megatron_mod.parallel.agree import on_first_rank
from megatron_mod.parallel.topology import Topology, print_once

REPORT, FIGURE = "calibration.json", "calibration.png"


def calibrate(request: BudgetRequest, ranks: Topology) -> dict:
    """Set the thresholds that meet the budget; called by all ranks. Returns ``calibration.json``.

    Raises:
        ValueError: nothing to calibrate, or a budget that cannot be met; nothing is written.
    """
    settings = {name: getattr(request, name) for name in ("max_length", "batch_size", "pooling")}
    model = load_routed(request.load, ranks, dtype=request.dtype, base=request.base, **settings)
    if noops := model.work.routing.num_noop_experts:
        raise ValueError(
            f"--load {request.load}: its gates choose among no-op experts "
            f"(router.num_noop_experts = {noops}), and no threshold decides; there is nothing to "
            "calibrate."
        )
    rows = calibration_rows(request, model)
    if request.max_perplexity_increase is not None and model.work.routing.is_exact:
        raise ValueError(
            f"--max-perplexity-increase {request.max_perplexity_increase}: is over the dense "
            "model, and one that was trained with router.selection top_k is none if it keeps "
            "everything; give --capacity, --work or --speedup."
        )
    scope = request.scope or model.trained_scope
    timing = None
    if not is_megatron(request.load) and ranks.world_size == 1:
        timing = ExportTiming(model.backend.model, rows)
    tokens = sum(len(row.ids) for row in rows)
    print_once(f"{len(rows)} samples, {tokens} tokens of {request.data}; scope {scope}")
    if timing:
        print_once(
            f"prefill and decode: {len(timing.prompts)} prompts of {timing.mean_length:.0f} tokens "
            "(mean), dense and routed in turn"
        )

    with tqdm(desc="passes over the samples", unit="") as passes:
        calibration = Calibration(
            model.backend, rows, model.work, scope=scope, after_pass=passes.update
        )
        found = find(request, calibration)
        chosen = found.point
        curve = Curve(calibration, timing=timing)
        say(HEADER)
        is_exact = model.work.routing.is_exact
        say(dense_line(calibration, ALL_KEPT if is_exact else "dense"))
        shown: list[CurvePoint] = []
        for capacity in request.curve:
            shown.append(curve.at(calibration.at_capacity(capacity, tolerance=NEAR)))
            say(line(shown[-1]))
        lines = [("as it was", calibration.at(model.backend.thresholds)), ("chosen", chosen)]
        if found.other:
            lines.insert(1, ("instead", found.other))
        for name, point in lines:
            shown.append(curve.at(point))
            say(line(shown[-1], name))
    instead = shown.pop(-2).to_dict() if found.other else None
    *points, was, met = (point.to_dict() for point in shown)
    report = {
        "request": request.to_dict(),
        "samples": len(rows),
        "tokens": tokens,
        "scope": scope,
        "pooling": model.backend.pooling,
        "timed_prompts_mean_tokens": timing and timing.mean_length,
        "dense_perplexity": calibration.dense.perplexity,
        "curve": points,
        "before": was,
        "chosen": met,
        "chosen_by": found.method,
        "instead": instead,
    }
    save = partial(
        write_thresholds, model, chosen.thresholds, save=request.save, add=partial(add, report)
    )
    folder = on_first_rank(lambda: str(save()))
    print_once(
        f"{request.describe()}: capacity {chosen.mean_capacity:.3f}; thresholds, {REPORT} and "
        f"{FIGURE} are in {folder}\n"
        f"found by {found.method} for all routers: work "
        f"{chosen.flops / calibration.dense_flops:.3f} of the dense model's"
    )
    return report


def calibration_rows(request: BudgetRequest, model: Routed) -> list[Row]:
    """The samples to observe.

    Raises:
        ValueError: a text, which has no prompts, where decisions are to be made on prompts.
    """
    backend = model.backend
    if backend.pooling == "prompt" and not holds_conversations(request.data):
        raise ValueError(
            f"--data {request.data}: a text has no prompts for a sequence's decision to see; give "
            "conversations (.jsonl, .json, .parquet), or --pooling all to decide on whole windows "
            "of the text."
        )
    length = min(request.max_length or TEXT_LENGTH, backend.max_length)
    rows = read_rows(request.data, backend.tokenizer, max_length=length)
    return evenly(rows, request.samples or len(rows))


def say(text: str) -> None:
    """Print on the first rank, above the progress bar."""
    if dist.get_rank() == 0:
        tqdm.write(text)


def add(report: dict, folder: Path) -> None:
    """Write report and figure into a folder."""
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    figure = quality_against_work(
        report["curve"],
        dense_perplexity=report["dense_perplexity"],
        chosen=report["chosen"],
    )
    figure.savefig(folder / FIGURE, dpi=150)


HEADER = (
    f"{'':<10} {'capacity':>8} {'perplexity':>10} {'counted':>8} {'prefill':>8} {'decode':>8}"
    f"   static: {'perplexity':>10} {'counted':>8} {'removed':>8}"
)


def dense_line(calibration: Calibration, name: str = "dense") -> str:
    return f"{name:<10} {1:>8.3f} {calibration.dense.perplexity:>10.3f}"


def line(shown: CurvePoint, name: str = "") -> str:
    """A point of the curve as a row of the table."""

    def ratio(value: float | None) -> str:
        return f"{'-' if value is None else f'{value:.3f}x':>8}"

    point, static = shown.point, "-"
    if shown.static:
        static = f"{shown.static.perplexity:.3f}"
    return (
        f"{name:<10} {point.mean_capacity:>8.3f} {point.perplexity:>10.3f}"
        f" {ratio(shown.speedup)} {ratio(shown.prefill)} {ratio(shown.decode)}"
        f"           {static:>10} {ratio(shown.static_speedup)}"
        f" {len(shown.removed):>8}"
    )
