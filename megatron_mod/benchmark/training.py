"""Trainings of routers in turn: speed, memory, counted work and how much of the machine is used."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from multiprocessing import connection
from pathlib import Path
from statistics import fmean, median

import torch
from tqdm import tqdm

from megatron_mod.benchmark.training_process import Measured, Place, Round, work
from megatron_mod.benchmark.training_ways import REFERENCE, WARM_UP, WAYS, Setup
from megatron_mod.parallel import device
from megatron_mod.process import MISTAKE

LIBRARIES = ("torch", "transformers", "megatron-core")
KEYS = (
    "tokens_per_second", "peak_memory_gb", "mflop_per_token", "share_of_matmul_rate",
    "router_gradient_max_rel",
)  # fmt: skip
OF_WAYS = (
    "router_gradient_missing", "tokens_per_second_range", "matmul_gflops", "resident_gb",
    "capacity",
)  # fmt: skip
MEANING = {
    "tokens_per_second": "useful tokens, no padding; median of the rounds",
    "peak_memory_gb": "of one process, the largest of its ranks: torch's allocator on a GPU; else "
    "resident memory without the pages of mapped weights and of the prefix cache",
    "mflop_per_token": "counted in a round by itself, without attention scores, per useful token",
    "share_of_matmul_rate": "counted operations a second over those of a plain matrix product, "
    "measured before each round in the same processes",
    "router_gradient_max_rel": "first step: largest difference from the published formula in plain "
    "Transformers in float64, over the largest value",
}


class Process:
    """A way's processes, which wait while others are at work; ``seconds``: what their start took,
    imports left out."""

    def __init__(self, way: str, options: Sequence[str], first: Place) -> None:
        """``first``: the place of rank 0, from which the others' differ in the rank."""
        self.way = way
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        (first.scratch / f"{way}.meet").unlink(missing_ok=True)
        for rank in range(first.ranks):
            ours, theirs = context.Pipe()
            place = replace(first, rank=rank)
            process = context.Process(target=work, args=(way, options, place, theirs), daemon=True)
            process.start()
            theirs.close()  # so that its end is noticed
            self.pipes.append(ours)
            self.processes.append(process)
        self.seconds = max(self._answers())

    def run(self, asked: Round) -> list[Measured]:
        """A round, as each rank found it."""
        for pipe in self.pipes:
            pipe.send(asked)
        return self._answers()

    def _answers(self) -> list:
        """What each rank sends next; where one has failed, the end, with what its status says."""
        answers: dict = {}
        while len(answers) < len(self.pipes):
            ready = connection.wait([pipe for pipe in self.pipes if pipe not in answers])
            for pipe, process in zip(self.pipes, self.processes, strict=True):
                if pipe not in ready:
                    continue
                try:
                    answers[pipe] = pipe.recv()
                except EOFError:
                    self._fail(process)
        return [answers[pipe] for pipe in self.pipes]

    def _fail(self, failed: multiprocessing.process.BaseProcess) -> None:
        failed.join()
        for process in self.processes:
            process.terminate()
        if failed.exitcode == MISTAKE:  # it has said what
            sys.exit(MISTAKE)
        sys.exit(f"{self.way}: failed; its message is above.")

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def compare(
    setup: Setup,
    *,
    ways: Sequence[str],
    reference: bool = True,
    threads: int | None,
    folder: str | None,
) -> dict:
    """Run the ways in turn and print a table; the figures, as ``--json`` writes them.

    Args:
        reference: whether gradients are compared.
        threads: of each process; ``None``: a plain way has all cores, a rank of ours its share.
        folder: where to work (``None``: the temporary folder).
    """
    cores = os.cpu_count() or 1
    dtype = setup.dtype or ("bfloat16" if device.HAS_GPU else "float32")
    setup = replace(setup, dtype=dtype)
    processes: dict[str, Process] = {}
    counting: dict[str, Process] = {}
    started: dict[str, float] = {}
    filled: dict[str, float] = {}
    wanted = None
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        if reference:
            options = setup.options(REFERENCE, scratch)
            process = Process(REFERENCE, options, Place(0, 1, threads or cores, scratch))
            wanted = process.run(Round(0, 1))[0].gradient
            process.end()
        for way in ways:
            # A line, no bar: the processes show bars of their own, and a mistake they found.
            print(f"starting {way}", file=sys.stderr, flush=True)
            ranks = 1 if WAYS[way].is_plain else setup.ranks
            place = Place(0, ranks, threads or max(1, cores // ranks), scratch)
            options = setup.options(way, scratch)
            if WAYS[way].fills_cache and not filled:  # those after it find the cache full
                first = Process(way, options, place)
                filled[way] = first.seconds
                first.end()
                options.append(f"--checkpoint.save={scratch}/{way}_again")
            processes[way] = Process(way, options, place)
            started[way] = processes[way].seconds
            if not WAYS[way].is_plain and not counts_what_runs(dtype):
                local = [
                    "--model.transformer_impl=local",
                    f"--checkpoint.save={scratch}/{way}_counted",
                ]
                counting[way] = Process(way, [*options, *local], place)
                counting[way].run(Round(0, WARM_UP))
        rounds = take_turns(processes, setup, counting=counting)
        for process in (*processes.values(), *counting.values()):
            process.end()
    report = summarise(rounds, wanted)
    report["device"] = device.describe()
    conditions = report["conditions"]
    conditions.update(describe(setup, ways, threads=threads, cores=cores))
    conditions["start_seconds"] = started
    for way, seconds in filled.items():
        tokens = sum(measured[0].tokens for measured in rounds[way])
        conditions["prefix_filling"] = {"seconds": seconds - started[way], "tokens": tokens}
    print(table(report), flush=True)
    return report


def counts_what_runs(dtype: str) -> bool:
    """Whether torch sees the products that ours computes: not those of Transformer Engine."""
    if not device.HAS_GPU:
        return True
    from megatron_mod.model.specs import choose_implementation

    return choose_implementation(dtype=getattr(torch, dtype)) == "local"


def take_turns(
    processes: Mapping[str, Process],
    setup: Setup,
    *,
    counting: Mapping[str, Process] | None = None,
) -> dict[str, list[list[Measured]]]:
    """All rounds of each way, and of each round all ranks' answers: the first steps, the timed
    rounds, and the counted one. Who is first changes every round.

    ``counting``: those of the ways whose counted round others run.
    """
    counting = counting or {}
    asked = [Round(0, WARM_UP)]
    for number in range(setup.rounds + 1):
        first = WARM_UP + number * setup.steps
        asked.append(Round(first, setup.steps, counts=number == setup.rounds))
    found: dict[str, list[list[Measured]]] = {way: [] for way in processes}
    with tqdm(total=len(asked) * len(processes), desc="rounds", unit="round") as progress:
        for number, each in enumerate(asked):
            for way in list(processes) if number % 2 else reversed(list(processes)):
                process = counting.get(way, processes[way]) if each.counts else processes[way]
                found[way].append(process.run(each))
                progress.update()
    return found


def summarise(
    rounds: dict[str, list[list[Measured]]], wanted: list[list[float]] | None = None
) -> dict:
    """The figures of each way, and the conditions that come from the measurements.

    Args:
        rounds: of each way, as ``take_turns`` gives them.
        wanted: the reference's gradient; ``None``: there is none.
    """
    found: dict[str, dict] = {}
    conditions: dict[str, dict] = {key: {} for key in OF_WAYS}
    for way, (first, *timed, counted) in rounds.items():
        speeds = [answers[0].tokens / max(a.seconds for a in answers) for answers in timed]
        rates = [sum(a.rate for a in answers) for answers in timed]
        operations = [a.flops for a in counted if a.flops is not None]
        assert len(operations) == len(counted)
        flops = sum(operations) / counted[0].tokens
        everything = [a for answers in (first, *timed) for a in answers]
        peaks = [a.peak for a in everything if a.peak is not None]
        kept = [a[0].capacity for a in timed if a[0].capacity is not None]
        missing = WAYS[way].no_gradient or (None if wanted else "the reference was left out")
        difference = None
        if not missing:
            gradient = first[0].gradient
            assert gradient is not None
            assert wanted is not None
            difference = max_rel(gradient, wanted)
        found[way] = {
            "tokens_per_second": median(speeds),
            "peak_memory_gb": max(peaks) / 1e9 if len(peaks) == len(everything) else None,
            "mflop_per_token": flops / 1e6,
            "share_of_matmul_rate": median(
                flops * speed / rate for speed, rate in zip(speeds, rates, strict=True)
            ),
            "router_gradient_max_rel": difference,
        }
        notes = {
            "router_gradient_missing": missing,
            "tokens_per_second_range": [min(speeds), max(speeds)],
            "matmul_gflops": median(rates) / 1e9,
            "resident_gb": max((a.resident for a in everything if a.resident), default=0) / 1e9,
            "capacity": fmean(kept) if kept else None,
        }
        for key, value in notes.items():
            if value:
                conditions[key][way] = value
    return {"ways": found, "device": "", "conditions": conditions}


def max_rel(found: list[list[float]], wanted: list[list[float]]) -> float:
    """Largest difference over the largest value."""
    ours, theirs = (torch.tensor(rows, dtype=torch.float64) for rows in (found, wanted))
    return float((ours - theirs).abs().max() / theirs.abs().max())


def describe(setup: Setup, ways: Sequence[str], *, threads: int | None, cores: int) -> dict:
    """What was run, how and with what."""
    asked = {**asdict(setup), "hf_path": str(setup.hf_path), "data": str(setup.data)}
    return {
        **{key: list(value) if key == "settings" else value for key, value in asked.items()},
        "cores": cores,
        "threads": threads or {"plain": cores, "ours": max(1, cores // setup.ranks)},
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "what": {way: WAYS[way].what for way in ways},
        "settings_of": {way: WAYS[way].settings for way in ways if WAYS[way].settings},
        "meaning": MEANING,
    }


def table(report: dict) -> str:
    """The figures in Markdown, with speed and memory beside the first way's."""
    ways, conditions = report["ways"], report["conditions"]
    first = next(iter(ways.values()))
    spread = conditions["tokens_per_second_range"]
    lines = [
        f"{report['device']}, {json.dumps(conditions['threads'])} threads, {conditions['dtype']}",
        f"| way | tokens/s | range | beside {next(iter(ways))} | memory, GB | beside |"
        " MFLOP a token | of the matmul rate | gradient differs by |",
        f"|{' --- |' * 9}",
    ]
    for way, found in ways.items():
        speed, memory, shown = (found[key] for key in KEYS[:3])
        low, high = spread[way]
        gradient = found["router_gradient_max_rel"]
        beside = memory / first["peak_memory_gb"] if memory and first["peak_memory_gb"] else None
        lines.append(
            f"| {way} | {speed:.0f} | {low:.0f}-{high:.0f} |"
            f" {speed / first['tokens_per_second']:.2f}x |"
            f" {'-' if memory is None else f'{memory:.2f}'} |"
            f" {'-' if beside is None else f'{beside:.2f}x'} | {shown:.0f} |"
            f" {100 * found['share_of_matmul_rate']:.0f} % |"
            f" {'-' if gradient is None else f'{gradient:.1e}'} |"
        )
    if filling := conditions.get("prefix_filling"):
        lines.append(
            f"\nThe prefix cache was filled before with {filling['tokens']} tokens in "
            f"{filling['seconds']:.1f} s, which no way's figure includes."
        )
    return "\n".join(lines)
