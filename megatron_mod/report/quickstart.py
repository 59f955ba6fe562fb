"""The quickstart's measurements of an export against its untouched original."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from megatron_mod.benchmark.inference_speed import decisions_of, kept_share, prefill_flops
from megatron_mod.calibration.curve import Curve
from megatron_mod.calibration.routed import load_routed
from megatron_mod.calibration.search import Calibration
from megatron_mod.conversion.source import open_source
from megatron_mod.data.dataset import load_samples
from megatron_mod.evaluation import speed
from megatron_mod.evaluation.huggingface import load_huggingface, load_model
from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend
from megatron_mod.evaluation.load import load_backend
from megatron_mod.evaluation.perplexity import perplexity
from megatron_mod.evaluation.rows import Row, evenly, level_batches
from megatron_mod.evaluation.static import METHOD
from megatron_mod.evaluation.work import Work
from megatron_mod.parallel import topology
from megatron_mod.routing.scheme import Scheme

# What is timed is of the text that is scored: a threshold keeps more or less of another one.
BATCH = 8  # samples of a prefill, as texts are scored: products of few rows are slower by the row
PREFILLS = 36  # by each model, or a few more
QUESTIONS = 8  # whose answers are decoded, one at a time


def build_report(
    *,
    hf_path: str | Path,
    export: str | Path,
    run: str | Path,
    parity: str | Path,
    ranking: str | Path,
    held_out: str | Path,
    max_length: int,
    published: str | Path | None = None,
    adapted: str | Path | None = None,
) -> dict:
    """Measure quality and speed and put them beside the training's summary.

    Args:
        ranking: text that the layers of static removal are chosen on.
        held_out: text that everything is scored on. Training saw neither.
        published: a run of the published recipe, to be scored too.
        adapted: a run of adapters alone, on the dense model, to be scored too.

    Raises:
        ValueError: ``adapted`` has routers.
    """
    if adapted and open_source(adapted).routing is not None:
        raise ValueError(
            f"--adapted {adapted}: has routers; give a run of adapters alone (router.layers: [])."
        )
    dense, tokenizer = load_huggingface(hf_path)
    routed = load_model(export)
    routing = routed.config.routing
    work = Work.of(routed.config.to_dict())
    assert work.routing is not None
    rows = {
        name: [Row.labelled(one) for one in load_samples(path, tokenizer, max_length=max_length)]
        for name, path in (("ranking", ranking), ("held_out", held_out))
    }

    timings = measure_speed(dense, routed, work, rows["held_out"])
    with_dense = perplexity(HuggingFaceBackend(dense, tokenizer), rows["held_out"])
    backend = HuggingFaceBackend(routed, tokenizer, pooling=routing["pooling"])
    with tqdm(desc="passes over the text", unit="") as passes:
        calibration = Calibration(
            backend, rows["held_out"], work, scope=routing["scope"], after_pass=passes.update
        )
        curve = Curve(calibration, ranking=rows["ranking"])
        found = curve.at(calibration.at(backend.thresholds))
    assert found.static is not None
    assert found.static_speedup is not None
    parities = {entry["hf_path"]: entry["max_rel"] for entry in json.loads(read(parity))}
    summary = json.loads(read(Path(run) / "summary.json"))
    return {
        "model": dense.config._name_or_path,
        "device": summary["device"],
        "world_size": summary["world_size"],
        "parallel": summary["parallel"],
        "train": summary["train"],
        "parity": {
            "hf_to_megatron_max_rel": parities[str(hf_path)],
            "megatron_to_hf_max_rel": parities[str(export)],
        },
        "target": " and ".join(Scheme.parse(routing["granularity"]).targets),
        "static_method": METHOD,
        "quality": {
            "dense_perplexity": with_dense.perplexity,
            "routed_perplexity": found.point.perplexity,
            "static_method": METHOD,
            "static_perplexity": found.static.perplexity,
            "static_removed_layers": found.removed_layers,
            "static_capacity": found.static.mean_capacity,
            "static_counted_speedup": found.static_speedup,
            "work": {"routed": 1 / found.speedup, "static": 1 / found.static_speedup},
            **(score_published(published, rows["held_out"]) if published else {}),
            **(score_adapted(adapted, rows["held_out"]) if adapted else {}),
            "eval_tokens": with_dense.tokens,
            "pooling": routing["pooling"] or "token",  # a token decides on itself
        },
        "capacity": {
            "target": fmean(routing["capacity"]),
            "mean": found.point.mean_capacity,
            "per_layer": dict(zip(work.routing.labels, found.point.capacity, strict=True)),
        },
        "speed": timings,
        "export_path": str(Path(export).resolve()),
    }


def measure_speed(dense, routed, work: Work, rows: Sequence[Row]) -> dict:
    """Prefills of ``BATCH`` rows at once, and decode steps of the answers to single rows' prompts:
    the report's ``speed``, with the prefills' capacity and counted work."""
    models = [dense, routed]
    batches = level_batches([row.ids for row in rows], size=BATCH)
    shown = tqdm(batches, desc="timing prefills", unit="batch")
    prefills = -(-PREFILLS // len(batches))
    whole = speed.compare(models, shown, prefills=prefills, new_tokens=0)
    room = dense.config.max_position_embeddings - speed.NEW_TOKENS
    questions = [row.ids[: min(max(row.context, 1), room)] for row in rows]
    shown = tqdm(evenly(questions, QUESTIONS), desc="timing answers", unit="answer")
    answers = speed.compare(models, (torch.tensor([ids]) for ids in shown), prefills=1)
    capacity, counted = prefill_work(routed, work, batches)
    return {
        "context_tokens": batches[0].shape[1],
        "capacity": capacity,
        "counted": counted,
        "prefill": {"batch": len(batches[0]), **beside(whole, "prefill")},
        "decode": {"batch": 1, **beside(answers, "decode")},
    }


def beside(timings: Sequence[speed.Timing], phase: str) -> dict:
    """Median times of ``prefill`` or ``decode`` of the dense and the routed model, and what they
    say."""
    dense, routed = timings
    found = speed.speedup(getattr(dense, f"{phase}s"), getattr(routed, f"{phase}s"))
    return {
        "dense_s": getattr(dense, f"{phase}_s"),
        "routed_s": getattr(routed, f"{phase}_s"),
        "speedup": found.ratio,
        "speedup_low": found.low,
        "speedup_high": found.high,
        "confidence": speed.CONFIDENCE,
        "pairs": found.pairs,
        "is_measurable": found.is_measurable,
    }


def score_published(run: str | Path, rows: Sequence[Row]) -> dict:
    """A training run on the rows, as it decides: ``published_perplexity``, ``published_capacity``
    and ``published_work``, a share of the dense model's."""
    with topology.single_process():
        model = load_routed(
            run, topology.ONE_RANK, dtype="float32", max_length=None, batch_size=4, pooling=None
        )
        routing = model.work.routing
        assert routing is not None
        calibration = Calibration(model.backend, rows, model.work, scope=routing.scope)
        point = calibration.at(model.backend.thresholds)
    return {
        "published_perplexity": point.perplexity,
        "published_capacity": point.mean_capacity,
        "published_work": point.flops / calibration.dense_flops,
    }


def score_adapted(run: str | Path, rows: Sequence[Row]) -> dict:
    """A training run of adapters alone on the rows: ``adapted_perplexity``, the dense model's with
    them."""
    with topology.single_process():
        backend = load_backend(run, topology.ONE_RANK, dtype="float32", batch_size=4)
        return {"adapted_perplexity": perplexity(backend, rows).perplexity}


@torch.no_grad()
def prefill_work(routed, work: Work, batches: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Share of the sequences of batches ``[B, S]``, or of their tokens, that the routed layers
    keep, and how many times less work than dense that leaves their prefills."""
    with decisions_of(routed) as made:
        for batch in batches:
            routed(batch.to(routed.device), use_cache=False, logits_to_keep=1)
    pairs = zip(made, batches, strict=True)
    flops = sum(prefill_flops(work, found, length=batch.shape[1]) for found, batch in pairs)
    dense = sum(len(batch) * work.prefill(batch.shape[1], {}) for batch in batches)
    return kept_share(made), dense / flops


def read(path: str | Path) -> str:
    return Path(path).read_text(encoding="utf-8")


def table(report: dict) -> str:
    """The report in a few lines a person understands."""
    train, quality, capacity, timing = (
        report[k] for k in ("train", "quality", "capacity", "speed")
    )
    ranks, par = report["world_size"], report["parallel"]
    dense, routed, fixed = (quality[f"{k}_perplexity"] for k in ("dense", "routed", "static"))
    better = "better" if routed < fixed else "no better"
    removed = len(quality["static_removed_layers"])
    rows = [
        ("model", report["model"]),
        (
            "ranks",
            f"{ranks} (tensor {par['tensor']} x pipeline {par['pipeline']} x data {par['data']})"
            f" on {report['device']}",
        ),
        (
            "training",
            f"{train['steps']} steps, {train['tokens']} tokens at"
            f" {train['tokens_per_second']:.0f} tokens/s; loss {number(train['loss_first'])}"
            f" -> {number(train['loss_last'])}",
        ),
        (
            "parameters",
            f"{train['trainable_parameters']} trained,"
            f" {train['frozen_parameters_changed']} frozen ones changed",
        ),
        (
            "same logits",
            f"HF vs Megatron {report['parity']['hf_to_megatron_max_rel']:.1e}, trained vs export"
            f" {report['parity']['megatron_to_hf_max_rel']:.1e} (largest relative difference)",
        ),
        (
            "capacity",
            f"{capacity['mean']:.3f} of the routed layers' {report['target']} kept on held-out text"
            f" (target {capacity['target']:.2f})",
        ),
        (
            "perplexity",
            f"dense {dense:.2f}, routed {routed:.2f} ({100 * (routed / dense - 1):+.1f} %),"
            f" best static removal ({quality['static_method']}, {removed} layers) {fixed:.2f}:"
            f" routers are {better}"
            f" ({quality['eval_tokens']} tokens, pooling: {quality['pooling']})",
        ),
        (
            "counted work",
            f"routed {quality['work']['routed']:.3f}, static {quality['work']['static']:.3f} of the"
            f" dense model's on held-out text; static capacity {quality['static_capacity']:.3f}",
        ),
        *_published_row(quality),
        *_adapted_row(quality),
        *(
            (
                f"{phase} time",
                f"dense {1e3 * timing[phase]['dense_s']:.0f} ms, routed"
                f" {1e3 * timing[phase]['routed_s']:.0f} ms: {in_words(timing[phase])} {what}",
            )
            for phase, what in (
                (
                    "prefill",
                    f"for {timing['prefill']['batch']} held-out samples of"
                    f" {timing['context_tokens']} tokens (capacity there {timing['capacity']:.2f},"
                    f" {timing['counted']:.2f}x counted)",
                ),
                ("decode", "for a token of the answer to a held-out question"),
            )
        ),
        ("export", report["export_path"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _published_row(quality: dict) -> list[tuple[str, str]]:
    if "published_perplexity" not in quality:
        return []
    return [
        (
            "published way",
            f"perplexity {quality['published_perplexity']:.2f} at capacity"
            f" {quality['published_capacity']:.3f}, work {quality['published_work']:.3f}",
        )
    ]


def _adapted_row(quality: dict) -> list[tuple[str, str]]:
    if "adapted_perplexity" not in quality:
        return []
    alone, dense = quality["adapted_perplexity"], quality["dense_perplexity"]
    found = f"perplexity {alone:.2f} ({100 * (alone / dense - 1):+.1f} %) on the dense model"
    return [("adapters alone", f"{found}; static removal above keeps those trained with routers")]


def in_words(found: dict) -> str:
    """A speed-up with its interval; that there is none to be seen, where chance explains it."""
    low, high, pairs = (found[key] for key in ("speedup_low", "speedup_high", "pairs"))
    if low is None:
        return f"no difference measurable in {pairs} pairs"
    interval = f"{low:.2f}x to {high:.2f}x at {100 * found['confidence']:.0f} %, {pairs} pairs"
    if not found["is_measurable"]:
        return f"no difference measurable ({interval})"
    return f"{found['speedup']:.2f}x ({interval})"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
