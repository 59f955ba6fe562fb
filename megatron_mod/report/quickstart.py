"""The quickstart's measurements of an export against its untouched original."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from megatron_mod.data.dataset import load_samples
from megatron_mod.evaluation import speed, static
from megatron_mod.evaluation.huggingface import load_huggingface, load_model
from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend
from megatron_mod.evaluation.perplexity import perplexity
from megatron_mod.evaluation.prompts import long_prompts
from megatron_mod.evaluation.rows import Row
from megatron_mod.routing.config import RoutingConfig

CONTEXT = 1000  # tokens of a prompt whose prefill and decode are timed, if the model has room
PROMPTS = 4


def build_report(
    *,
    hf_path: str | Path,
    export: str | Path,
    run: str | Path,
    parity: str | Path,
    ranking: str | Path,
    held_out: str | Path,
    max_length: int,
) -> dict:
    """Measure quality and speed and put them beside the training's summary.

    Args:
        ranking, held_out: JSON lines neither the training nor the other one has seen.
    """
    dense, tokenizer = load_huggingface(hf_path)
    routed = load_model(export)
    routing = routed.config.routing
    text = {
        name: load_samples(path, tokenizer, max_length=max_length)
        for name, path in (("ranking", ranking), ("held_out", held_out))
    }

    held_out_rows = [Row.labelled(sample) for sample in text["held_out"]]
    dense_backend = HuggingFaceBackend(dense, tokenizer)
    routed_backend = HuggingFaceBackend(routed, tokenizer, pooling=routing["pooling"])
    with_dense = perplexity(dense_backend, held_out_rows)
    with_routers = perplexity(routed_backend, held_out_rows)
    target = RoutingConfig.from_dict(routing).scheme.target
    importance = static.rank_layers(
        dense,
        text["ranking"],
        routing["layers"],
        target=target,
        progress=tqdm(text["ranking"], desc="ranking layers", unit="sample"),
    )
    capacity = fmean(with_routers.capacity)
    removed = static.removed_layers(importance, capacity=capacity)
    with static.without(dense, removed, target=target):
        with_static = perplexity(dense_backend, held_out_rows)

    context = min(CONTEXT, dense.config.max_position_embeddings - speed.NEW_TOKENS)
    prompts = long_prompts(tokenizer, length=context, count=PROMPTS)
    timing = speed.compare([dense, routed], tqdm(prompts, desc="timing", unit="prompt"))
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
        "quality": {
            "dense_perplexity": with_dense.perplexity,
            "routed_perplexity": with_routers.perplexity,
            "static_perplexity": with_static.perplexity,
            "static_removed_layers": removed,
            "eval_tokens": with_routers.tokens,
            "pooling": routing["pooling"],
        },
        "capacity": {
            "target": fmean(routing["capacity"]),
            "mean": capacity,
            "per_layer": dict(zip(map(str, routing["layers"]), with_routers.capacity, strict=True)),
        },
        "speed": {
            "context_tokens": context,
            "capacity": prompt_capacity(routed, prompts),
            **{
                phase: {
                    "dense_s": (d := getattr(timing[0], f"{phase}_s")),
                    "routed_s": (r := getattr(timing[1], f"{phase}_s")),
                    "speedup": d / r,
                }
                for phase in ("prefill", "decode")
            },
        },
        "export_path": str(Path(export).resolve()),
    }


@torch.no_grad()
def prompt_capacity(routed, prompts: Sequence[torch.Tensor]) -> float:
    """Share of the prompts, or of their tokens, that the routed layers kept."""
    kept = []
    for prompt in prompts:
        routed(prompt.to(routed.device), use_cache=False, logits_to_keep=1)
        kept.append(routed.routing_report()["capacity"])
    return fmean(kept)


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
            f"{capacity['mean']:.3f} of the routed layers' attention kept on held-out text"
            f" (target {capacity['target']:.2f})",
        ),
        (
            "perplexity",
            f"dense {dense:.2f}, routed {routed:.2f} ({100 * (routed / dense - 1):+.1f} %),"
            f" best static removal {fixed:.2f}: routers are {better}"
            f" ({quality['eval_tokens']} tokens, pooling: {quality['pooling']})",
        ),
        *(
            (
                f"{phase} time",
                f"dense {1e3 * timing[phase]['dense_s']:.0f} ms, routed"
                f" {1e3 * timing[phase]['routed_s']:.0f} ms:"
                f" {timing[phase]['speedup']:.2f}x at {timing['context_tokens']} tokens"
                f" (capacity there {timing['capacity']:.2f})",
            )
            for phase in ("prefill", "decode")
        ),
        ("export", report["export_path"]),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
