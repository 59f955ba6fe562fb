"""Models to evaluate, from the folders that users name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mod.config.model_folder import is_megatron
from megatron_mod.conversion import checkpoint as layout
from megatron_mod.conversion.hf_reader import read_config
from megatron_mod.conversion.source import open_source
from megatron_mod.evaluation.backend import Backend
from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend, load_huggingface
from megatron_mod.evaluation.megatron_backend import MegatronBackend
from megatron_mod.evaluation.work import Work
from megatron_mod.parallel.topology import Topology
from megatron_mod.training.restore import restore_model


def load_backend(
    load: str | Path, ranks: Topology, *, dtype: str, base: str | None = None, **settings
) -> Backend:
    """A backend on a Hugging Face folder, a base checkpoint or a training run; called by all ranks.

    Args:
        dtype: ``float32`` or ``bfloat16``.
        base: where the base of a training run is now, if not where it was.
        settings: ``max_length``, ``batch_size`` and ``pooling`` of ``Backend``.

    Raises:
        ValueError: nothing of the kind, or a setting that does not fit the model.
    """
    if is_megatron(load):
        model = restore_model(open_source(load, base=base), ranks, dtype=getattr(torch, dtype))
        return MegatronBackend(*model, **settings)
    return _huggingface(load, dtype, settings)


@dataclass(frozen=True)
class Routed:
    """A model with routers, what counts its work, and where its thresholds are kept.

    ``folder`` is an export or the step folder of a training, ``settings`` the JSON file in it whose
    ``routing`` holds the thresholds.
    """

    backend: Backend
    work: Work
    folder: Path
    settings: Path


def load_routed(
    load: str | Path, ranks: Topology, *, dtype: str, base: str | None = None, **settings
) -> Routed:
    """As ``load_backend``, of an export or a training run.

    Raises:
        ValueError: also a model without routers.
    """
    if is_megatron(load):
        source = open_source(load, base=base)
        work, folder, name = Work(source.base.arch, source.routing), source.step, layout.MANIFEST
    else:
        work, folder, name = Work.of(read_config(load)), Path(load), "config.json"
    if work.routing is None or not work.routing.layers:
        raise ValueError(f"--load {load}: has no routers; give an export or a training run.")
    if is_megatron(load):
        model = restore_model(source, ranks, dtype=getattr(torch, dtype))
        backend: Backend = MegatronBackend(*model, **settings)
    else:
        backend = _huggingface(load, dtype, settings)
    return Routed(backend, work, folder, folder / name)


def _huggingface(load: str | Path, dtype: str, settings: dict) -> HuggingFaceBackend:
    model, tokenizer = load_huggingface(load, dtype=getattr(torch, dtype))
    shared = {"data_rank": dist.get_rank(), "data_ranks": dist.get_world_size()}
    return HuggingFaceBackend(model, tokenizer, **settings, **shared)
