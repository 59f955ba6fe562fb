"""How fast data is prepared and dealt, and how much padding it costs."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_mod.data.batch import collate
from megatron_mod.data.chat import Messages, Sample, messages_of
from megatron_mod.data.dataset import Samples, load_samples
from megatron_mod.data.encoding import Encoder
from megatron_mod.data.loader import Loader
from megatron_mod.data.sources import files_of, read_file
from megatron_mod.data.templates import PublishedTemplate


def measure(
    data: str | Path,
    tokenizer,
    *,
    max_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    repeats: int,
) -> dict:
    """Tokens a second of each way to prepare and deal a JSON lines file, and shares of padding.

    What is compared takes turns, and medians are given. All see the published template's text;
    ``prepare`` is everything: reading, checking, tokenising, labelling, writing.

    Raises:
        ValueError: a number out of range, or data that training would refuse.
    """
    for name, number in (
        ("global_batch_size", global_batch_size),
        ("micro_batch_size", micro_batch_size),
        ("repeats", repeats),
    ):
        if number < 1:
            raise ValueError(f"{name} = {number}: must be at least 1.")
    settings = {"max_length": max_length, "template": "published"}
    with tempfile.TemporaryDirectory() as cache:
        if load_samples(data, tokenizer, cache=cache, **settings).has_texts:
            raise ValueError(
                f"--data {data}: has texts; the labelling of conversations is measured: give these "
                "only."
            )
    conversations = [
        messages_of(record.content) for path in files_of(data) for record in read_file(path)
    ]
    encoder = Encoder(tokenizer, max_length=max_length, template="published")
    texts = [item.text for item in encoder.template.render(conversations)]

    def prepare() -> None:
        with tempfile.TemporaryDirectory() as cache:
            load_samples(data, tokenizer, cache=cache, **settings)

    seconds = in_turns(
        {
            "prepare": prepare,
            "encode_and_label": lambda: encoder.encode(conversations),
            "batch_encoding": lambda: tokenizer(texts, truncation=True, max_length=max_length),
            "retokenising": lambda: [
                retokenised(messages, tokenizer, max_length) for messages in conversations
            ],
        },
        repeats=repeats,
    )
    with tempfile.TemporaryDirectory() as cache:
        samples = load_samples(data, tokenizer, cache=cache, **settings)
        tokens = sum(part.store.summary.tokens for part in samples.parts)
        sizes = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size}
        loaders = {
            "bucketed": Loader(samples, seed=0, **sizes),
            "packed": Loader(samples, seed=0, row_length=max_length, **sizes),
        }
        dealt = in_turns({n: lambda x=x: list(x.passes()) for n, x in loaders.items()}, repeats=3)
        return {
            "samples": len(samples),
            "tokens": tokens,
            "tokens_per_second": {n: tokens / wall for n, (wall, _) in seconds.items()},
            "tokens_per_cpu_second": {n: tokens / cpu for n, (_, cpu) in seconds.items()},
            "loader_tokens_per_second": {n: tokens / wall for n, (wall, _) in dealt.items()},
            "padding": {
                "neither": unsorted_padding(samples, loaders["bucketed"]),
                **{name: padding(loader) for name, loader in loaders.items()},
            },
        }


def needed_tokens_per_second(*, parameters: float, flops: float) -> float:
    """What a model of so many parameters takes at most on a device of so many operations a second:
    a forward pass alone, 2 operations a parameter and token.

    Raises:
        ValueError: one of them is no number above 0.
    """
    for name, number in (("parameters", parameters), ("flops", flops)):
        if not 0 < number < float("inf"):
            raise ValueError(f"{name} = {number}: must be a number above 0.")
    return flops / (2 * parameters)


def in_turns(
    ways: dict[str, Callable[[], object]], *, repeats: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of each, by the clock and of all processor cores together, after one
    warm-up; each once in every turn. On a shared machine the second says more."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter(), time.process_time()
            way()
            ended = time.perf_counter(), time.process_time()
            if turn:
                seconds[name].append((ended[0] - started[0], ended[1] - started[1]))
    return {n: tuple(map(statistics.median, zip(*s, strict=True))) for n, s in seconds.items()}


def retokenised(messages: Messages, tokenizer, max_length: int) -> tuple[list[int], list[bool]]:
    """Ids and labels the published way: the text up to each border is tokenised anew."""
    template = PublishedTemplate(tokenizer.eos_token)

    def ids(text: str) -> list[int]:
        return tokenizer(text, truncation=True, max_length=max_length)["input_ids"]

    (whole,) = template.render([messages])
    tokens = ids(whole.text)
    labelled = [False] * len(tokens)
    for start, end in whole.spans:
        first, last = len(ids(whole.text[:start])), len(ids(whole.text[:end]))
        labelled[first:last] = [True] * (last - first)
    return tokens, labelled


def padding(loader: Loader, *, epochs: int = 1) -> float:
    """Share of padding over the steps of an epoch, in the order training has."""
    steps = max(1, epochs * len(loader.samples) // loader.global_batch_size)
    batches = [loader.step(number) for number in range(steps)]
    return 1 - sum(b.num_tokens for b in batches) / sum(b.num_positions for b in batches)


def unsorted_padding(samples: Samples, loader: Loader) -> float:
    """What the same steps would pad with one document a row, in the order they are drawn."""
    tokens = positions = 0
    size, count = loader.micro_batch_size, len(samples) // loader.global_batch_size
    drawn = [samples[loader.order[i]] for i in range(max(1, count) * loader.global_batch_size)]
    for first in range(0, len(drawn), size):
        rows: Sequence[Sample] = drawn[first : first + size]
        tokens += sum(len(sample.ids) for sample in rows)
        positions += collate(rows).input_ids.numel()
    return 1 - tokens / positions
