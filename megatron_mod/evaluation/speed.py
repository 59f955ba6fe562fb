"""Prefill and decode time of two models, taken in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mod.hf.cache_mod import CACHE
from megatron_mod.hf.kernels_mod import kernels_of_any_shape
from megatron_mod.parallel.device import synchronize

PREFILLS = 2  # of each prompt by each model
NEW_TOKENS = 24
CONFIDENCE = 0.99  # of an interval


@dataclass(frozen=True)
class Timing:
    """Seconds of each prefill of a batch of prompts and of each decode step of it, in the order in
    which they were taken; ``prefill_s`` and ``decode_s`` are their medians."""

    prefills: Sequence[float]
    decodes: Sequence[float]

    @property
    def prefill_s(self) -> float:
        return statistics.median(self.prefills)

    @property
    def decode_s(self) -> float:
        return statistics.median(self.decodes)


@dataclass(frozen=True)
class Speedup:
    """How many times faster a model is than another.

    Args:
        ratio: of the medians.
        low, high: between them lies, with ``CONFIDENCE``, the median of what a pair of calls that
            followed each other would show; ``None``: too few pairs to say.
        pairs: of calls.
    """

    ratio: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def is_measurable(self) -> bool:
        """Whether it is told from chance."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


def speedup(slow: Sequence[float], fast: Sequence[float]) -> Speedup:
    """Of the second model's times over the first's, which were taken in turn.

    The interval needs no distribution: of ``n`` ratios, so many lie below their median as heads
    fall in ``n`` throws of a coin, so ratios in the order of their size enclose it (Conover,
    Practical Nonparametric Statistics, section 3.2). A pair shares what the machine did meanwhile.
    """
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    count, outside, below = len(ratios), 0, 0.0
    while below + (more := math.comb(count, outside) / 2**count) <= (1 - CONFIDENCE) / 2:
        below += more
        outside += 1
    low, high = (ratios[outside - 1], ratios[count - outside]) if outside else (None, None)
    return Speedup(statistics.median(slow) / statistics.median(fast), low, high, count)


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
    return [Timing(*times) for times in zip(prefill_times, decode_times, strict=True)]


def _next_tokens(outputs: list) -> list[tuple[Tensor, object]]:
    """Each model's likeliest tokens ``[B, 1]`` with its cache."""
    return [(o.logits[:, -1:].argmax(-1), o[CACHE]) for o in outputs]


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
    # Exports decode without cuDNN's plans for each length; no other is to be slower for them.
    with nullcontext() if cache is None else kernels_of_any_shape():
        synchronize()
        start = time.perf_counter()
        output = model(ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        synchronize()
        return time.perf_counter() - start, output
