"""How fast the exports of models that were trained from scratch generate text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from megatron_mod.benchmark.isoflop_models import Entry, Setup
from megatron_mod.benchmark.isoflop_text import VALIDATION
from megatron_mod.conversion.convert import megatron_to_hf
from megatron_mod.evaluation.huggingface import load_huggingface

ROUNDS = 5  # after one that warms up


def time_sampling(setup: Setup, entries: Sequence[Entry]) -> list[dict]:
    """Greedy generation after half a row of held-out text, to the end of the row, one text at a
    time, all models in turn; medians of the rounds."""
    models = [_exported(setup, entry) for entry in entries]
    prompt = setup.length // 2
    text = (setup.out / VALIDATION).read_text(encoding="utf-8")
    ids = models[0][1](text, return_tensors="pt").input_ids[:, :prompt]
    new = setup.length - ids.shape[1]
    seconds: list[list[float]] = [[] for _ in models]
    for number in range(ROUNDS + 1):
        for (model, _), found in zip(models, seconds, strict=True):
            taken = _generate(model, ids, new)
            if number:
                found.append(taken)
    return [
        {
            "kind": entry.variant.kind,
            "capacity": entry.variant.capacity,
            "size": str(entry.size),
            "prompt": ids.shape[1],
            "new_tokens": new,
            "tokens_per_second": new / median(found),
        }
        for entry, found in zip(entries, seconds, strict=True)
    ]


def _exported(setup: Setup, entry: Entry):
    """The export of a training, which is made unless it is there, and its tokenizer."""
    folder = setup.out / "exports" / setup.key(entry)
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        megatron_to_hf(setup.run(entry), folder)
    return load_huggingface(folder)


@torch.no_grad()
def _generate(model, ids: Tensor, new: int) -> float:
    """Seconds."""
    began = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
    )
    return time.perf_counter() - began
