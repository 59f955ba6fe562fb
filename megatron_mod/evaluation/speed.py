"""Prefill and decode time of two models, taken in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mod.parallel.device import synchronize

PREFILLS = 2  # of each prompt by each model
NEW_TOKENS = 24


@dataclass(frozen=True)
class Timing:
    """Medians in seconds: ``prefill_s`` of one prompt, ``decode_s`` of one token."""

    prefill_s: float
    decode_s: float


@torch.no_grad()
def compare(
    models: Sequence, prompts: Iterable[Tensor], *, new_tokens: int = NEW_TOKENS
) -> list[Timing]:
    """Time the models on each prompt ``[1, S]``: prefills, then greedy decode steps, each in turn.

    Who goes first changes every time, so that a machine whose speed drifts is fair to all;
    a first round is not counted.
    """
    prefills: list[list[float]] = [[] for _ in models]
    decodes: list[list[float]] = [[] for _ in models]
    for model in models:
        _timed(model, torch.ones(1, 8, dtype=torch.int64), None)
    for prompt in prompts:
        for turn in range(PREFILLS):
            outputs = _in_turn(models, [(prompt, None)] * len(models), turn, prefills)
        for turn in range(new_tokens):
            inputs = [(o.logits[:, -1:].argmax(-1), o.past_key_values) for o in outputs]
            outputs = _in_turn(models, inputs, turn, decodes)
    return [
        Timing(statistics.median(prefill), statistics.median(decode))
        for prefill, decode in zip(prefills, decodes, strict=True)
    ]


def _in_turn(models: Sequence, inputs: list, turn: int, times: list[list[float]]) -> list:
    """Run each model on its ``(ids, cache)``, forwards on odd turns and backwards on even ones."""
    outputs = [None] * len(models)
    order = range(len(models))
    for which in order if turn % 2 else reversed(order):
        seconds, outputs[which] = _timed(models[which], *inputs[which])
        times[which].append(seconds)
    return outputs


def _timed(model, ids: Tensor, cache: object) -> tuple[float, object]:
    ids = ids.to(model.device)
    synchronize()
    start = time.perf_counter()
    output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    synchronize()
    return time.perf_counter() - start, output
