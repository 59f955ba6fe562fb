"""Small trainings in the test's own process, which is a world of one rank."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.config import cli
from megatron_mod.config.recipes import PUBLISHED
from megatron_mod.conversion.convert import hf_to_megatron
from tests.helpers import tiny

# What a run does where nothing is said, for ``Trainer.train``.
DEFAULT = {
    "router__granularity": "attn_token", "router__bias": "true", "router__init": "importance",
    "router__stand_in": "linear", "router__capacity_warmup_fraction": 0.5,
    "router__capacity_loss_weight": "auto", "router__pooling": None,
}  # fmt: skip

# The same with an exact selection of tokens.
EXACT = {
    "router__selection": "top_k", "router__granularity": "block_token", "router__capacity": 0.25,
    "router__bias": None, "router__init": None, "router__stand_in": None,
    "router__stand_in_rank": None, "router__stand_in_tokens": None,
    "router__capacity_loss_weight": None, "router__capacity_warmup_fraction": None,
    "router__pooling": None,
}  # fmt: skip

# The same with routers on experts.
EXPERTS = {
    **DEFAULT, "router__granularity": "expert_token", "router__stand_in": None,
    "router__stand_in_rank": None, "router__stand_in_tokens": None,
}  # fmt: skip


class Trainer:
    """A tiny base checkpoint and some text, to train routers with."""

    def __init__(self, folder: Path, *, kind: str = "llama", **changes: object) -> None:
        self.folder = folder
        self.hf = tiny.save_model(folder / "hf", kind, vocab_size=tiny.VOCAB, **changes)
        tiny.save_tokenizer(self.hf)
        self.base = folder / "base"
        hf_to_megatron(self.hf, self.base)
        self.text = folder / "train.jsonl"
        rows = [
            {"prompt": "ab" * (1 + n % 7), "completion": "cd" * (1 + n % 5) + str(n)}
            for n in range(20)
        ]
        self.text.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write_distinct(self) -> None:
        """Write texts of which no two begin alike: equal scores are told apart by nothing but
        rounding."""
        letters = random.Random(3)
        rows = [
            {
                "prompt": chr(65 + n) + "".join(letters.choices("abcdefgh", k=5 + n % 7)),
                "completion": "".join(letters.choices("stuvwxyz", k=5 + n % 5)),
            }
            for n in range(24)
        ]
        self.text.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(self, run: Path, **changes: object) -> list[str]:
        settings = {
            "model.checkpoint": self.base, "model.dtype": "float32", "router.layers.deepest": 2,
            **PUBLISHED, "router.granularity": "attn_sequence",
            "router.capacity_loss_weight": 0.3, "router.pooling": "all",
            "data.train": self.text, "data.max_length": 64, "train.steps": 6,
            "train.global_batch_size": 4, "train.micro_batch_size": 2, "optimizer.lr": 0.05,
            "optimizer.average_fraction": 0.8, "checkpoint.save": run, "checkpoint.interval": 2,
            **{name.replace("__", "."): value for name, value in changes.items()},
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in settings.items() if value is not None]

    def train(self, run: Path, **changes: object) -> dict:
        """What launch/pretrain_router.py does once ranks have met; the run's summary."""
        from megatron_mod.training.loop import train
        from megatron_mod.training.plan import prepare

        config = cli.parse(self.arguments(run, **changes))
        return train(config, prepare(config))


# What a run's lines say of how it went, and of what it computed nothing.
MEASURED = (
    "tokens_per_second", "tflops_per_second", "share_of_peak", "memory_allocated", "memory_peak",
    "seconds",
)  # fmt: skip


def metrics(run: Path) -> list[dict]:
    """A run's lines without its times and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def saved(run: Path) -> dict[str, bytes]:
    """All tensors of a run's newest step, to the bit: routers, their average, the optimizer's."""
    state = run / (run / "latest").read_text().strip() / "state"
    return {
        name: tensor.flatten().view(torch.uint8).numpy().tobytes()
        for name, tensor in load_tensors(state).items()
    }
