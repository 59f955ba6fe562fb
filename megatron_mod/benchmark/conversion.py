"""Speed and memory of both conversions beside a plain copy."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from megatron_mod.checkpoint.folders import new_folder
from megatron_mod.conversion.check import expected_shape
from megatron_mod.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.hf_writer import HFWriter
from megatron_mod.conversion.mappings import to_hf
from megatron_mod.parallel import topology

SHAPE = {  # Llama-3-8B's, with as many layers as the size asks for
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def make_folder(folder: Path, *, size: float) -> None:
    """A Hugging Face folder of about ``size`` bytes of random bf16 weights."""

    def likes(layers: int) -> dict[str, torch.Tensor]:
        family = family_of(config := {**SHAPE, "num_hidden_layers": layers})
        arch = family.architecture_of(config)
        found = {}
        for row in family.table(arch):
            shape = expected_shape(arch, row.megatron)
            found.update(to_hf(row, torch.empty(shape, dtype=torch.bfloat16, device="meta")))
        return found

    def total(layers: int) -> int:
        return sum(like.nbytes for like in likes(layers).values())

    layers = max(1, round((size - total(0)) / (total(1) - total(0))))
    folder.mkdir()
    config = {**SHAPE, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    found = likes(layers)
    largest = max(like.numel() for like in found.values())
    random = torch.randint(-(2**15), 2**15, (2 * largest,), dtype=torch.int16)
    random &= ~0x4000  # the exponent's highest bit: smaller than 2, so no infinity and no NaN
    writer = HFWriter(folder)
    for index, (name, like) in enumerate(found.items()):

        def read(like: torch.Tensor = like, start: int = 997 * index % largest) -> torch.Tensor:
            return random[start : start + like.numel()].view(torch.bfloat16).view(like.shape)

        writer.add(name, like, read)
    writer.close()


def copy(source: Path, target: Path) -> None:
    with new_folder(target) as folder:
        for path in source.iterdir():
            shutil.copyfile(path, folder / path.name)


TASKS = {"copy": copy, "to Megatron": hf_to_megatron, "to Hugging Face": megatron_to_hf}


def work(kind: str, source: Path, target: Path, result: Connection) -> None:
    """One measured piece of work, in a process of its own; sends seconds and memory before."""
    with topology.single_process():
        before, started = anonymous_memory(os.getpid()), time.perf_counter()
        TASKS[kind](source, target)
        seconds = time.perf_counter() - started
    result.send((seconds, before))


def anonymous_memory(pid: int) -> int:
    """Bytes of anonymous memory a process holds; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0][1]) * 1024 if lines else 0


def measure(kind: str, source: Path, target: Path) -> tuple[float, int]:
    """Seconds, and the largest anonymous memory above what the process began with."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(kind, source, target, sender))
    process.start()
    peak = 0
    while process.is_alive():
        peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.01)
    if process.exitcode:
        sys.exit(f"{kind}: failed; its message is above.")
    seconds, before = receiver.recv()
    return seconds, peak - before


def compare(*, size: float, folder: str | Path | None) -> None:
    """Make a model folder of about ``size`` bytes, take it there and back, and print the figures.

    ``folder``: where to work (``None``: the temporary folder).
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        hf, megatron = Path(scratch, "hf"), Path(scratch, "megatron")
        make_folder(hf, size=size)
        size = sum(path.stat().st_size for path in hf.iterdir())
        print(f"{size / 1e9:.2f} GB")
        for kind, source, target in (
            ("copy", hf, Path(scratch, "copy")),
            ("to Megatron", hf, megatron),
            ("to Hugging Face", megatron, Path(scratch, "back")),
            ("copy", hf, Path(scratch, "copy")),
        ):
            seconds, memory = measure(kind, source, target)
            print(
                f"{kind:<16} {size / seconds / 1e9:6.2f} GB/s  {seconds:7.1f} s  "
                f"{memory / 1e6:7.0f} MB anonymous memory",
                flush=True,
            )
            if target != megatron:
                shutil.rmtree(target)
