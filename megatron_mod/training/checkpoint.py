"""Saves what training changes (what trains, optimizer, run state) and reads it back. Of a training
of the whole model that is all of it: a step then has config and tokenizer too, and needs no base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_mod.checkpoint.companions import write_companions
from megatron_mod.checkpoint.distributed import load_state, save_state
from megatron_mod.checkpoint.folders import write_durably
from megatron_mod.checkpoint.manifest import HUGGINGFACE, STATE, read_manifest, write_manifest
from megatron_mod.model.trainable import AVERAGE, Trainable
from megatron_mod.parallel import device
from megatron_mod.parallel.agree import on_first_rank
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.training.average import ParameterAverage
from megatron_mod.training.faults import FaultCounter, require_finite
from megatron_mod.training.metrics import Metrics
from megatron_mod.training.optimizer_state import OptimizerState

RANDOM = "random."  # before the key of a random state
_TRACKED = "megatron."


@dataclass
class RunState:
    """Everything that steps change."""

    trainable: Trainable
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    controller: CapacityController
    average: ParameterAverage
    metrics: Metrics
    faults: FaultCounter


def save_step(
    folder: Path,
    state: RunState,
    *,
    step: int,
    manifest: dict,
    companions: Mapping[str, bytes] | None = None,
) -> None:
    """Fill a step's folder, which exists and is empty; called by all ranks.

    ``companions``: config, tokenizer and so on of a model that is saved whole.
    """
    trainable = state.trainable
    require_finite(step, trainable.kept.values())
    optimizer = OptimizerState(state.optimizer, trainable.model, loading=False)
    steps = optimizer.steps()
    content = {
        "model": trainable.sharded(),
        "average": trainable.sharded(state.average.mean, prefix=AVERAGE),
        "optimizer": optimizer.tensors() if steps else {},
        "random": _random_states(),
    }
    target = folder / STATE
    on_first_rank(target.mkdir)
    if companions is not None:
        on_first_rank(lambda: write_companions(companions, folder / HUGGINGFACE))
    save_state(content, target)
    averaged = manifest["averaged"] and state.average.count > 0
    progress = {
        "optimizer_steps": steps,
        "scheduler_steps": state.scheduler.num_steps,
        "averaged_steps": state.average.count,
        "controller": state.controller.state_dict(),
        "metrics": state.metrics.state_dict(),
        "faults": state.faults.state_dict(),
    }
    own = {"averaged": averaged, "progress": progress}
    values = {"kind": "routers", "step": step, **manifest, **own}
    on_first_rank(lambda: write_manifest(folder, values))


def load_step(folder: Path, state: RunState, *, same_topology: bool) -> int:
    """Put a step's folder, already verified, into the run; returns the step. All ranks.

    Random states belong to ranks and are read only if every rank is what it was.
    """
    manifest = read_manifest(folder)
    progress = manifest["progress"]
    trainable = state.trainable
    optimizer = OptimizerState(state.optimizer, trainable.model, loading=True)
    wanted = {"model": trainable.sharded()}
    if progress["averaged_steps"]:
        empty = {
            key: torch.empty_like(p, dtype=torch.float32) for key, p in trainable.parameters.items()
        }
        wanted["average"] = trainable.sharded(empty, prefix=AVERAGE)
    if progress["optimizer_steps"]:
        wanted["optimizer"] = optimizer.tensors()
    if same_topology:
        wanted["random"] = _random_states()
    loaded = load_state(wanted, folder / STATE)

    trainable.put(loaded.get("model", {}))
    if progress["optimizer_steps"]:
        weights = {k: t for k, t in loaded.get("model", {}).items() if k in trainable.parameters}
        tensors = {**loaded.get("optimizer", {}), **weights}
        optimizer.load(tensors, steps=progress["optimizer_steps"])
    else:
        state.optimizer.reload_model_params()  # its copies, where it steps some
    state.scheduler.step(increment=progress["scheduler_steps"] - state.scheduler.num_steps)
    state.average.count = progress["averaged_steps"]
    averages = loaded.get("average", {})
    state.average.mean = {key.removeprefix(AVERAGE): t for key, t in averages.items()}
    state.controller.load_state_dict(progress["controller"])
    state.metrics.load_state_dict(progress["metrics"])
    state.faults.load_state_dict(progress["faults"])
    if same_topology:
        _write_random(loaded["random"])
    return manifest["step"]


def random_sizes() -> dict[str, int]:
    """Bytes of each random state a rank has; those of a GPU are other ones than a CPU's."""
    return {key: len(state) for key, state in _read_random().items()}


def _random_states() -> dict[str, ShardedTensor]:
    """This rank's random states, each row ``rank`` of a tensor ``[world_size, bytes]``."""
    row = (0, dist.get_rank(), dist.get_world_size())
    return {
        key: ShardedTensor.from_rank_offsets(RANDOM + key, state.clone()[None], row)
        for key, state in _read_random().items()
    }


def _read_random() -> dict[str, Tensor]:
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    found = {_TRACKED + name: state for name, state in tracker.items()}
    found["torch"] = torch.get_rng_state()
    if device.HAS_GPU:
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _write_random(states: dict[str, Tensor]) -> None:
    states = {key: state[0].clone() for key, state in states.items()}
    tracked = {k.removeprefix(_TRACKED): s for k, s in states.items() if k.startswith(_TRACKED)}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)
    torch.set_rng_state(states["torch"])
    if device.HAS_GPU:
        torch.cuda.set_rng_state(states["cuda"])


def write_json(path: Path, values: dict) -> None:
    write_durably(path, json.dumps(values, indent=2) + "\n")
