"""What a finished training says: where the result is, and what to type next."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from megatron_mod.config.schema import Config

_ROOT = Path(__file__).resolve().parents[2]


def next_steps(config: Config, *, steps: int) -> str:
    """Some lines for a run of ``steps`` steps, with commands for the folder one is in."""
    run = Path(config.checkpoint.save)
    export = run.with_name(f"{run.name}_export")
    data = config.data.validation
    text = data if isinstance(data, str) and data.endswith(".jsonl") else "FILE"
    return "\n".join(
        (
            f"Done: {steps} steps; the routers are in {run}. Next:",
            _command("convert_megatron_to_hf.py", "--load", run, "--save", export),
            _command("evaluate.py", "--load", export, "--perplexity", text),
        )
    )


def _command(tool: str, *options: object) -> str:
    path = os.path.relpath(_ROOT / "tools" / tool)
    return "  " + shlex.join(["python", path, *map(str, options)])
