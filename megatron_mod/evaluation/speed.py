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
    """Medians in seconds: ``prefill_s`` of one batch of prompts, ``decode_s`` of one step of it."""

    prefill_s: float
    decode_s: float


@torch.no_grad()
def compare(
    models: Sequence,
    prompts: Iterable[Tensor],
    *,
    prefills: int = PREFILLS,
    new_tokens: int = NEW_TOKENS,
) -> list[Timing]:
    """Time the models on each batch ``[B, S]``: prefills, then greedy decode steps, each in turn.

    Who goes first changes every time, so that a machine whose speed drifts is fair to all; a
    prefill and a step of the first batch are not counted.
    """
    prefill_times: list[list[float]] = [[] for _ in models]
    decode_times: list[list[float]] = [[] for _ in models]
    for number, prompt in enumerate(prompts):
        inputs = [(prompt, None)] * len(models)
        if number == 0:
            uncounted: list[list[float]] = [[] for _ in models]
            outputs = _in_turn(models, inputs, 0, uncounted)
            _in_turn(models, _next_tokens(outputs), 0, uncounted)
        for turn in range(prefills):
            outputs = _in_turn(models, inputs, turn, prefill_times)
        for turn in range(new_tokens):
            outputs = _in_turn(models, _next_tokens(outputs), turn, decode_times)
    return [
        Timing(statistics.median(prefill), statistics.median(decode))
        for prefill, decode in zip(prefill_times, decode_times, strict=True)
    ]


def _next_tokens(outputs: list) -> list[tuple[Tensor, object]]:
    """Each model's likeliest tokens ``[B, 1]`` with its cache."""
    return [(o.logits[:, -1:].argmax(-1), o.past_key_values) for o in outputs]


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
