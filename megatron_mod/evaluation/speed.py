"""Prefill and decode time of two models, taken in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mod.parallel.device import synchronize

NEW_TOKENS = 16


@dataclass(frozen=True)
class Timing:
    """Medians in seconds: ``prefill_s`` of one prompt, ``decode_s`` of one token."""

    prefill_s: float
    decode_s: float


def compare(
    models: Sequence, prompts: Iterable[Tensor], *, new_tokens: int = NEW_TOKENS
) -> list[Timing]:
    """Time each model on each prompt ``[1, S]``, alternating, after one unmeasured round."""
    prefills: list[list[float]] = [[] for _ in models]
    decodes: list[list[float]] = [[] for _ in models]
    for turn, prompt in enumerate(prompts):
        order = list(range(len(models)))
        for which in order if turn % 2 else reversed(order):
            if turn == 0:
                measure(models[which], prompt, new_tokens=2)
            prefill, decode = measure(models[which], prompt, new_tokens=new_tokens)
            prefills[which].append(prefill)
            decodes[which] += decode
    return [
        Timing(statistics.median(prefill), statistics.median(decode))
        for prefill, decode in zip(prefills, decodes, strict=True)
    ]


@torch.no_grad()
def measure(model, prompt: Tensor, *, new_tokens: int) -> tuple[float, list[float]]:
    """Seconds of the prefill and of each greedy decode step, with the model's own cache."""
    prompt = prompt.to(model.device)
    prefill, output = _timed(model, prompt, None)
    decode = []
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        seconds, output = _timed(model, token, output.past_key_values)
        decode.append(seconds)
    return prefill, decode


def _timed(model, ids: Tensor, cache: object) -> tuple[float, object]:
    synchronize()
    start = time.perf_counter()
    output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    synchronize()
    return time.perf_counter() - start, output
