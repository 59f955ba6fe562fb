"""Perplexity of a Hugging Face causal language model on tokenised samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mod.data.chat import Sample


@dataclass(frozen=True)
class Quality:
    """``perplexity`` over ``tokens`` labelled tokens; ``capacity``: share of the samples, or of
    their tokens, that kept each routed layer (empty for a dense model)."""

    perplexity: float
    tokens: int
    capacity: list[float]


@torch.no_grad()
def perplexity(
    model, samples: Sequence[Sample], *, progress: Iterable[Sample] | None = None
) -> Quality:
    """Score each sample's labelled tokens given all before them, one sample at a time.

    A routed model decides as its ``routing.pooling`` says: with ``prompt`` it sees only
    the tokens before the first labelled one, as it would when generating the answer.
    """
    routing = getattr(model.config, "routing", None)
    loss, tokens, kept, units = 0.0, 0, 0, 0
    for sample in progress or samples:
        ids = torch.tensor([sample.ids], device=model.device)
        targets = label_positions(sample)
        extra = {}
        if routing and routing["granularity"].endswith("sequence"):
            seen = sample.prompt_length if routing["pooling"] == "prompt" else len(sample.ids)
            extra["routing_mask"] = (torch.arange(len(sample.ids)) < seen)[None].to(model.device)
        output = model(ids, logits_to_keep=targets - 1, use_cache=False, **extra)
        loss += float(cross_entropy(output.logits[0], ids[0, targets]))
        tokens += len(targets)
        if routing:
            report = model.routing_report()["layers"]
            kept += torch.tensor([report[layer]["kept"] for layer in routing["layers"]])
            units += torch.tensor([report[layer]["units"] for layer in routing["layers"]])
    capacity = (kept / units).tolist() if routing else []
    return Quality(math.exp(loss / tokens), tokens, capacity)


def label_positions(sample: Sample) -> Tensor:
    """Positions of the labelled tokens that have a token before them."""
    return torch.tensor([i for i, is_label in enumerate(sample.labelled) if is_label and i])


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed nats of ``targets`` ``[N]`` under ``logits`` ``[N, vocab]``."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
