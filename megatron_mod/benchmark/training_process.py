"""A way of training in a process of its own: waits to be told, runs a round, says what it took."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from megatron_mod.benchmark.training_ways import REFERENCE, WAYS
from megatron_mod.commands.command import mistakes_told

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_mod.benchmark.training_ours import Ours
    from megatron_mod.benchmark.training_plain import Plain


@dataclass(frozen=True)
class Round:
    """What a process is to do: ``steps`` from the step ``first`` on, counted from 0.

    ``counts``: whether operations are counted, which takes time.
    """

    first: int
    steps: int
    counts: bool = False


@dataclass(frozen=True)
class Measured:
    """What one process found in a round.

    Args:
        seconds: from its first step's start to its last one's end.
        tokens: useful ones of all ranks.
        flops: floating-point operations of this rank without attention scores; where counted.
        rate: operations a second of a plain matrix product on this rank, just before.
        peak: largest memory in bytes (see ``peak_memory``); unset: this system does not tell.
        resident: the same with mapped files; unset: on a GPU.
        gradient: of all routers in the first step, a list of rows.
        capacity: share of units that the last step kept, where some may be skipped.
    """

    seconds: float
    tokens: int
    flops: int | None
    rate: float
    peak: int | None
    resident: int | None
    gradient: list[list[float]] | None
    capacity: float | None


@dataclass(frozen=True)
class Place:
    """Where a process runs: rank ``rank`` of ``ranks``, on so many ``threads``, writing to
    ``scratch``."""

    rank: int
    ranks: int
    threads: int
    scratch: Path


def work(way: str, options: Sequence[str], place: Place, connection: Connection) -> None:
    """Get ready, say how long that took, then run rounds until there are no more."""
    # Before torch is imported. The same as torchrun tells a rank.
    if place.ranks > 1:
        os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.rank))
        os.environ.update(WORLD_SIZE=str(place.ranks), LOCAL_WORLD_SIZE=str(place.ranks))
    os.environ["OMP_NUM_THREADS"] = str(place.threads)
    with mistakes_told(), contextlib.ExitStack() as stack:
        silence = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(silence))  # a training's; ours is a table
        runner = Runner(way, options, place, stack)
        connection.send(runner.seconds)
        while (asked := _received(connection)) is not None:
            connection.send(runner.run(asked))


def _received(connection: Connection) -> Round | None:
    """What is asked for; nothing more if whoever asks has gone."""
    try:
        return connection.recv()
    except EOFError:
        return None


class Runner:
    """A way's training and the measurements around it; ``seconds``: what its start took."""

    training: Plain | Ours

    def __init__(
        self, way: str, options: Sequence[str], place: Place, stack: contextlib.ExitStack
    ) -> None:
        import torch

        from megatron_mod.config import cli

        torch.set_num_threads(place.threads)  # where torch was imported before the variable was set
        config = cli.parse(list(options))
        assert config.model.hf_path is not None
        self.dtype = getattr(torch, config.model.dtype)
        if way == REFERENCE:
            way, self.dtype = "published_stop", torch.float64
        if WAYS[way].is_plain:
            from megatron_mod.benchmark.training_plain import Plain

            started = time.perf_counter()
            self.training = Plain(way, config, dtype=self.dtype)
        else:
            from megatron_mod.benchmark.training_ours import Ours

            started = time.perf_counter()
            self.training = Ours(config, stack, meet=place.scratch / f"{way}.meet")
        self.seconds = time.perf_counter() - started
        self.mapped = [Path(config.model.hf_path), place.scratch]

    def run(self, asked: Round) -> Measured:
        """A round: the rate of matrix products, then the steps."""
        from megatron_mod.estimate.matmul import synchronize

        rate = self.rate()
        can_tell = forget_peak()
        taken, flops = [], None
        synchronize()
        started = time.perf_counter()
        with counting() if asked.counts else contextlib.nullcontext() as counter:
            for number in range(asked.first, asked.first + asked.steps):
                taken.append(self.training.step(number))
            synchronize()
        seconds = time.perf_counter() - started
        if counter is not None:
            flops = counter.get_total_flops()
        gradient = taken[0].gradient if asked.first == 0 else None
        peak, resident = peak_memory(self.mapped) if can_tell else (None, None)
        return Measured(
            seconds=seconds,
            tokens=sum(step.tokens for step in taken),
            flops=flops,
            rate=rate,
            peak=peak,
            resident=resident,
            gradient=None if gradient is None else gradient.cpu().tolist(),
            capacity=self.training.capacity(),
        )

    def rate(self) -> float:
        """Operations a second of the MLP's first product with as many tokens as a micro-batch has
        positions, ``[N, H] x [H, F]``."""
        from megatron_mod.estimate.matmul import matmul_rate

        batches = self.training.loader.step(0).micro_batches
        tokens = round(fmean(batch.input_ids.numel() for batch in batches))
        hidden, ffn = self.training.shape
        return matmul_rate(tokens, hidden, ffn, dtype=self.dtype)


@contextlib.contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts the operations of the block, but for fused attention, which only some devices count,
    and of grouped keys none."""
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    attentions = [each for each in flop_registry if "attention" in str(each)]
    nothing = dict.fromkeys(attentions, lambda *args, **kwargs: 0)
    with FlopCounterMode(display=False, custom_mapping=nothing) as counter:
        yield counter


def forget_peak() -> bool:
    """Measure memory from here on; whether this system can."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


def peak_memory(mapped: Sequence[Path]) -> tuple[int, int | None]:
    """Largest memory since ``forget_peak``: of torch's allocator on a GPU; else resident above the
    pages of files below the folders ``mapped``, which the kernel takes back when it needs them, and
    with them."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), None
    status = Path("/proc/self/status").read_text().splitlines()
    (resident,) = [1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    return resident - mapped_pages(mapped), resident


def mapped_pages(folders: Sequence[Path]) -> int:
    """Bytes that this process has in memory of files below some folders."""
    files = {str(file.resolve()) for folder in folders for file in folder.rglob("*")}
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if "-" in words[0]:  # a mapping's first line: addresses, mode, offset, device, inode, path
            counts = len(words) == 6 and words[5] in files
        elif counts and words[0] == "Rss:":
            total += 1024 * int(words[1])
    return total
