"""What routers save on one GPU: of a layer, prefill and decode, a training step, memory."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_mod.benchmark import routing, training
from megatron_mod.benchmark.decode_attention import attention_times
from megatron_mod.benchmark.decode_host import host_times
from megatron_mod.benchmark.gpu_memory import train_within
from megatron_mod.benchmark.inference_speed import Pair
from megatron_mod.benchmark.isoflop_text import TRAIN, make_tokenizer, write_text
from megatron_mod.benchmark.training_ways import Setup
from megatron_mod.config.shapes import SHAPES
from megatron_mod.conversion.export import portable_config
from megatron_mod.model import fp8
from megatron_mod.model.specs import choose_implementation
from megatron_mod.parallel import device, topology

DTYPE = torch.bfloat16 if device.HAS_GPU else torch.float32
AIM = 0.05  # of the dense layer's time, which a routed one may take beyond its counted work
GRANULARITIES = ("attn_token", "block_token", "block_sequence")
# batch and context, in the order of what is most wanted
CELLS = (
    (1, 2048), (1, 8192), (8, 2048), (16, 2048), (8, 8192), (1, 32768), (64, 2048), (16, 8192),
    (8, 32768), (64, 8192),
)  # fmt: skip
NEW_TOKENS = 12
WAYS = ("published", "published_stop", "recompute", "cached", "sparse")
LEFT_OUT = {"left_out": "no time was left"}
# About how long each part takes, which is how they share the time that there is.
SHARES = {
    "layer": 60, "dense": 20, "inference": 240, "host": 15, "attention": 15, "training": 150,
    "memory": 100,
}  # fmt: skip
VOCABULARY = 512  # of the tokenizer; the model's own is larger


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Args:
        shape: of ``config.shapes.SHAPES``.
        size: the layer's, of ``routing.SIZES``.
        length: tokens of the layer's four sequences, each as long as a training's rows.
        cells: batch and context of prefill and decode.
        training_layers: layers of the model whose training steps are timed.
        memory_gb: what the training of the whole model may take, of 1e9 bytes.
        seconds: for everything; what there is no time for is left out, and said.
        folder: where models are written.
    """

    shape: str
    size: str
    length: int
    cells: Sequence[tuple[int, int]]
    training_layers: int
    memory_gb: float
    seconds: float
    folder: Path


def measure(asked: Asked, parts: Sequence[str], save: Callable[[dict], None]) -> dict:
    """Run the parts in turn; ``save`` gets the report after each row.

    A part that fails is said to have, and the others follow. What one does not take of its time is
    the others'.
    """
    ends = time.monotonic() + asked.seconds
    report: dict = {"device": device.describe(), "torch": torch.__version__, "parts": {}}
    for number, name in enumerate(parts):
        began = time.monotonic()
        if began >= ends:
            report["parts"][name] = LEFT_OUT
            save(report)
            continue
        until = began + (ends - began) * SHARES[name] / sum(SHARES[each] for each in parts[number:])
        rows: list[dict] = []
        part: dict = {"rows": rows}
        report["parts"][name] = part
        try:
            for row in PARTS[name](asked, until):
                rows.append(row)
                print(f"{name}: {json.dumps(row)}", flush=True)
                save(report)
        except (RuntimeError, ValueError, SystemExit) as error:  # a kernel that is not there, say
            part["failed"] = f"{type(error).__name__}: {error}"
            print(f"{name}: {part['failed']}", flush=True)
        part["seconds"] = time.monotonic() - began
        save(report)
        forget()
    return report


def forget() -> None:
    """Give memory of earlier parts back."""
    gc.collect()
    if device.HAS_GPU:
        torch.cuda.empty_cache()


def layers(asked: Asked, ends: float) -> Iterator[dict]:
    """Routed layers of all granularities beside the dense one, as ``routing.compare``; ``most_ms``
    is what its counted work would take, and ``AIM`` more."""
    with topology.single_process():
        for row in routing.compare(asked.size, _setting(asked)):
            most = row["dense_ms"] * (1 / row["ideal_speedup"] + AIM)
            yield {**row, "most_ms": most, "reached": row["routed_ms"] <= most}


def _setting(asked: Asked, *, repetitions: int = 5) -> routing.Setting:
    return routing.Setting(
        batch=4,
        length=asked.length // 4,
        repetitions=repetitions,
        training=False,
        implementation=choose_implementation(),
        dtype=DTYPE,
    )


def dense_layers(asked: Asked, ends: float) -> Iterator[dict]:
    """The dense layer as built here beside Megatron-core's own, and beside itself with products in
    FP8 where there are any, in turn."""
    from megatron_mod.benchmark.megatron_layer import megatron_layer

    setting = _setting(asked, repetitions=15)
    with topology.single_process():
        made = {
            "ours": routing.layer_of(asked.size, None, setting),
            "megatron": megatron_layer(asked.size, setting),
        }
        if not fp8.why_not(setting.implementation):
            in_fp8 = replace(setting, fp8="hybrid")
            made["fp8"] = routing.layer_of(asked.size, None, in_fp8)
        timed = [
            routing.Timed(name, layer, rotary, setting, asked.size)
            for name, (layer, rotary) in made.items()
        ]
        routing.take_turns(timed, setting.repetitions)
    ms = {f"{one.name}_ms": 1e3 * statistics.median(one.times) for one in timed}
    yield {
        "implementation": setting.implementation,
        **ms,
        "ratio": ms["ours_ms"] / ms["megatron_ms"],
    }


def inference(asked: Asked, ends: float) -> Iterator[dict]:
    """Prefill and decode with half of the layers' units skipped, as ``Pair.measure``."""
    for number, granularity in enumerate(GRANULARITIES):
        now = time.monotonic()
        until = now + (ends - now) / (len(GRANULARITIES) - number)
        pair = Pair.of_shape(asked.shape, granularity, dtype=DTYPE)
        for batch, context in asked.cells:
            if batch == 1 and granularity.endswith("sequence"):
                continue
            cell = {"granularity": granularity, "batch": batch, "context": context}
            if time.monotonic() >= until:
                yield {**cell, **LEFT_OUT}
                continue
            repetitions = 5 if batch * context <= 2**14 else 1
            try:
                found = pair.measure(
                    batch, context, repetitions=repetitions, new_tokens=NEW_TOKENS, capacity=0.5
                )
            except torch.cuda.OutOfMemoryError:
                found = {"failed": "out of memory"}
            yield {**cell, **found}
            forget()
        del pair
        forget()


def host(asked: Asked, ends: float) -> Iterator[dict]:
    """What of a decode step by graphs is the host's, as ``host_times``."""
    yield from host_times()


def attention(asked: Asked, ends: float) -> Iterator[dict]:
    """The attention of a decode step, as ``attention_times``."""
    cells = [cell for cell in asked.cells if cell[0] * cell[1] <= 2**15]
    yield from attention_times(asked.shape, cells, DTYPE)


def trainings(asked: Asked, ends: float) -> Iterator[dict]:
    """Training steps in several ways, as ``training.compare``; of a model of fewer layers, as each
    way has a copy."""
    for granularity in ("attn_token", "block_token"):
        if time.monotonic() >= ends:
            yield {"granularity": granularity, **LEFT_OUT}
            continue
        model = random_model(asked, asked.training_layers)
        setup = Setup(
            hf_path=model,
            data=asked.folder / TRAIN,
            granularity=granularity,
            layers=asked.training_layers // 2,
            ranks=1,
            pipeline=1,
            batch=4,
            micro_batch=2,
            max_length=asked.length // 4,
            steps=2,
            rounds=3,
            dtype=None,
            settings=[],
        )
        found = training.compare(
            setup, ways=WAYS, reference=False, threads=None, folder=str(asked.folder)
        )
        first = found["ways"][WAYS[0]]["tokens_per_second"]
        of_published = {n: first / w["tokens_per_second"] for n, w in found["ways"].items()}
        yield {"granularity": granularity, "time_of_published": of_published, **found}


def memory(asked: Asked, ends: float) -> Iterator[dict]:
    """A training of the whole model's routers in a process that may take so much and no more."""
    model = random_model(asked, None)
    for granularity in ("attn_token", "block_token"):
        if time.monotonic() >= ends:
            yield {"granularity": granularity, **LEFT_OUT}
            continue
        run = asked.folder / f"memory_{granularity}"
        options = {
            "model.hf_path": model,
            "model.dtype": str(DTYPE).removeprefix("torch."),
            "router.granularity": granularity,
            "router.layers.deepest": SHAPES[asked.shape]["num_hidden_layers"] // 2,
            "data.train": asked.folder / TRAIN,
            "data.cache": asked.folder / "memory_data",
            "data.max_length": asked.length // 4,
            "train.steps": 3,
            "train.global_batch_size": 1,
            "train.micro_batch_size": 1,
            "checkpoint.save": run,
            "checkpoint.interval": 0,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        args = (asked.memory_gb, arguments, run, theirs)
        process = context.Process(target=train_within, args=args)
        process.start()
        theirs.close()
        found: dict = {"failed": "its process ended; its message is above"}
        with contextlib.suppress(EOFError):
            found = ours.recv()
        process.join()
        yield {"granularity": granularity, "limit_gb": asked.memory_gb, **found}


def random_model(asked: Asked, num_layers: int | None) -> Path:
    """A folder with a model of random weights, made once; ``num_layers``: not its shape's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = asked.folder / f"model_{num_layers}"
    write_text(asked.folder, None)
    if not folder.exists():
        shape = {**portable_config(SHAPES[asked.shape])}
        shape.pop("model_type")
        shape["num_hidden_layers"] = num_layers or shape["num_hidden_layers"]
        shape["vocab_size"] = max(VOCABULARY, shape["vocab_size"])
        with device.device():
            model = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=DTYPE)
        model.save_pretrained(folder)
        for file in make_tokenizer(asked.folder, vocabulary=VOCABULARY).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


PARTS: dict[str, Callable[[Asked, float], Iterator[dict]]] = {
    "layer": layers,
    "dense": dense_layers,
    "inference": inference,
    "host": host,
    "attention": attention,
    "training": trainings,
    "memory": memory,
}
