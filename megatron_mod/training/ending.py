"""What a finished training says: its summary, where the result is, and what to type next."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from megatron_mod.config.schema import Config
from megatron_mod.parallel import device
from megatron_mod.training.checkpoint import RunState
from megatron_mod.training.plan import Plan

_ROOT = Path(__file__).resolve().parents[2]


def summary(config: Config, plan: Plan, state: RunState, *, changed: int) -> dict:
    """``summary.json``; ``changed``: how many frozen parameters are not what they were."""
    metrics = state.metrics
    first, last = metrics.first or {}, metrics.last or {}
    return {
        "device": device.describe(),
        "world_size": plan.topology.world_size,
        "parallel": plan.topology.to_dict(),
        "train": {
            "steps": plan.steps,
            "skipped_steps": state.faults.skipped,
            "tokens": metrics.tokens,
            "tokens_per_second": metrics.tokens_per_second(),
            "padding": metrics.padding(),
            "loss_first": first.get("task_loss"),
            "loss_last": last.get("task_loss"),
            "trainable_parameters": state.trainable.count(),
            "frozen_parameters_changed": changed,
        },
        "capacity_last": last.get("capacity"),
        "work_last": last.get("work"),
        "work_target": config.router.work,
    }


def next_steps(config: Config, *, steps: int) -> str:
    """Some lines for a run of ``steps`` steps, with commands for the folder one is in."""
    run = Path(config.checkpoint.save)
    export = run.with_name(f"{run.name}_export")
    data = config.data.validation
    text = data if isinstance(data, str) and data.endswith(".jsonl") else "FILE"
    return "\n".join(
        (
            f"Done: {steps} steps; the {_what(config)} in {run}. Next:",
            command("tools/convert_megatron_to_hf.py", "--load", run, "--save", export),
            command("tools/evaluate.py", "--load", export, "--perplexity", text),
        )
    )


def _what(config: Config) -> str:
    """What has been trained, in words, and is or are there."""
    if config.train.trainable == "all":
        return "whole model is"
    words = {"stand_ins": "stand-ins", "lora": "adapters"}
    *others, last = (words.get(part, part) for part in config.train.parts)
    return f"{', '.join(others)} and {last} are" if others else f"{last} are"


def command(script: str, *options: object) -> str:
    """A line with a command for the folder one is in; ``script``: its path in the repository."""
    path = os.path.relpath(_ROOT / script)
    return "  " + shlex.join(["python", path, *map(str, options)])
