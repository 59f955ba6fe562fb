"""Commands as a user runs them, and what they are run on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from megatron_mod.config.recipes import PUBLISHED
from tests.helpers import tiny
from tests.helpers.runs import metrics

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, ok: bool = True, **environment: str) -> str:
    """Run a command in the repository; its whole output. ``ok``: whether it has to succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert (done.returncode == 0) is ok, done.stdout
    return done.stdout


def torchrun(ranks: int, *command: object, **options) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return run(*launcher, "--nproc_per_node", ranks, *command, **options)


def save_tiny(folder: Path) -> Path:
    """A tiny Llama with a tokenizer, that holds what the quickstart's samples are cut to."""
    return tiny.save_tokenizer(
        tiny.save_llama(folder, vocab_size=tiny.VOCAB, max_position_embeddings=320)
    )


def settings(base: Path, data: Path) -> list:
    """Overrides that fit a shipped configuration to that model, trained as published."""
    return [
        "--config", "configs/smollm2/135m_attn_sequence.yaml",
        "--model.checkpoint", base, "--data.train", data,
        "--data.validation", "null", "--train.validation_interval", 0, "--train.steps", 2,
        "--router.layers.deepest", 2, "--data.max_length", 200,
        "--parallel.pipeline_model_parallel_size", 1,
        *(f"--{name}={value}" for name, value in PUBLISHED.items()),
        "--router.capacity_loss_weight", "1.0",
    ]  # fmt: skip


def read_metrics(folder: Path) -> list[dict]:
    """Of a run's steps."""
    return [line for line in metrics(folder) if "loss" in line]


def blocks(page: str, language: str) -> list[str]:
    """The code of one language on a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
