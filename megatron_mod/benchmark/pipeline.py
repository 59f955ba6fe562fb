"""Training steps at an even cut of the pipeline and at the cheapest one, in turn."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import megatron.core
import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_mod.config import cli
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.hf_reader import read_config
from megatron_mod.conversion.restore import load_model
from megatron_mod.parallel import device
from megatron_mod.parallel.topology import Topology
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.training.optimizer import wrap_ddp
from megatron_mod.training.plan import make_loader, prepare
from megatron_mod.training.step import run_schedule

CUTS = ("even", "auto")


class Step(NamedTuple):
    """Useful tokens a second, seconds that each rank's processor was busy, the loss, and the share
    of the tokens that are labelled."""

    speed: float
    busy: list[float]
    loss: float
    labelled: float


class Trained:
    """A training's model and data at one cut; made by all ranks alike."""

    def __init__(self, settings: Mapping[str, object], *, cut: str) -> None:
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        config = cli.parse([*arguments, f"--parallel.pipeline_layout={cut}"])
        self.plan = prepare(config)
        assert self.plan.cut is not None
        self.cut = self.plan.cut
        self.model = load_model(
            self.plan.base,
            self.plan.routing,
            self.plan.topology,
            implementation=self.plan.implementation,
            dtype=getattr(torch, config.model.dtype),
        )
        self.chunks = wrap_ddp(self.model, use_distributed_optimizer=False)
        rank = self.model.groups.dp.rank()
        self.data = make_loader(config, self.plan, self.plan.train, data_rank=rank)

    def step(self, number: int) -> Step:
        """Forward and backward of a step, all ranks together."""
        batch = self.data.step(number)
        controller = CapacityController(
            self.plan.routing, device=device.device(), workload=self.plan.workload
        )
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        dist.barrier()
        started, busy = time.perf_counter(), time.process_time()
        result = run_schedule(
            self.chunks,
            self.model,
            batch,
            self.plan.routing,
            controller=controller,
            loss=self.plan.loss,
        )
        loss = float(result.loss)  # waits for the device
        busy = time.process_time() - busy
        dist.barrier()
        seconds = time.perf_counter() - started
        of_ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, busy)
        return Step(batch.num_tokens / seconds, of_ranks, loss, batch.num_labels / batch.num_tokens)


def compare(
    ranks: Topology,
    *,
    hf_path: str,
    data: str,
    granularity: str,
    deepest: int | None,
    max_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    repeats: int,
    dtype: str,
) -> dict:
    """Measure both cuts on the same samples; called by all ranks alike.

    A turn is a step of each, the first of them by turns; one turn warms up.

    Args:
        deepest: routed layers, the deepest but the last (``None``: half of all).

    Raises:
        ValueError: what a training would refuse.
    """
    with tempfile.TemporaryDirectory() as scratch:  # of a run that never saves
        settings = {
            "model.hf_path": hf_path,
            "model.dtype": dtype,
            "router.granularity": granularity,
            "router.layers.deepest": deepest or max(1, _num_layers(hf_path) // 2),
            "data.train": data,
            "data.max_length": max_length,
            "parallel.tensor_model_parallel_size": ranks.tensor,
            "parallel.pipeline_model_parallel_size": ranks.pipeline,
            "parallel.expert_model_parallel_size": ranks.expert,
            "train.steps": repeats + 1,
            "train.global_batch_size": global_batch_size,
            "train.micro_batch_size": micro_batch_size,
            "checkpoint.save": Path(scratch, "run"),
        }
        ways = {cut: Trained(settings, cut=cut) for cut in CUTS}
    steps: dict[str, list[Step]] = {cut: [] for cut in CUTS}
    for turn in tqdm(range(repeats + 1), desc="turns", unit="turn"):
        for cut in CUTS if turn % 2 else reversed(CUTS):
            steps[cut].append(ways[cut].step(turn))
    differences = [
        abs(a.loss / b.loss - 1) for a, b in zip(steps["auto"], steps["even"], strict=True)
    ]
    timed = {cut: found[1:] for cut, found in steps.items()}
    speeds = {cut: [step.speed for step in found] for cut, found in timed.items()}
    ratios = [a / b for a, b in zip(speeds["auto"], speeds["even"], strict=True)]
    found = ways["auto"].cut
    return {
        "device": device.describe(),
        "conditions": {
            "ranks": dist.get_world_size(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "megatron-core": megatron.core.__version__,
            },
            "settings": {name: value for name, value in settings.items() if "save" not in name},
            "labelled": statistics.fmean(step.labelled for step in timed["auto"]),
        },
        "layers": {cut: list(ways[cut].cut.layout) for cut in CUTS},
        "tokens_per_second": {cut: statistics.median(each) for cut, each in speeds.items()},
        "processor_seconds": {  # of a step, by rank
            cut: [statistics.median(rank) for rank in zip(*(s.busy for s in each), strict=True)]
            for cut, each in timed.items()
        },
        "steps": speeds,
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "speedup_predicted": found.step_cost(found.even) / found.step_cost(found.layout),
        "loss_max_rel": max(differences),
    }


def _num_layers(hf_path: str) -> int:
    config = read_config(hf_path)
    return family_of(config).architecture_of(config).num_layers


def described(result: dict) -> str:
    """The figures in words."""
    lines = [
        f"{cut:<5} {' + '.join(map(str, result['layers'][cut])):<16} layers "
        f"{result['tokens_per_second'][cut]:8.1f} tokens/s"
        for cut in CUTS
    ]
    least, most = result["speedup_range"]
    lines.append(
        f"auto is {result['speedup']:.2f}x as fast ({least:.2f}x to {most:.2f}x in "
        f"{len(result['steps']['auto'])} turns; predicted {result['speedup_predicted']:.2f}x)"
    )
    return "\n".join(lines)
