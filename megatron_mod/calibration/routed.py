"""A routed model to calibrate, and where its thresholds are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_mod.checkpoint.manifest import MANIFEST
from megatron_mod.config.model_folder import is_megatron
from megatron_mod.conversion.hf_reader import read_config
from megatron_mod.evaluation.backend import Backend
from megatron_mod.evaluation.load import open_huggingface
from megatron_mod.evaluation.work import Work

if TYPE_CHECKING:
    from megatron_mod.parallel.topology import Topology


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

    @property
    def trained_scope(self) -> str:
        """What was held to a capacity in training: each ``layer``, or all of the ``model``."""
        routing = self.work.routing
        assert routing is not None
        return "layer" if routing.is_exact else routing.scope


def load_routed(
    load: str | Path, ranks: Topology, *, dtype: str, base: str | None = None, **settings
) -> Routed:
    """As ``load_backend``, of an export or a training run.

    Raises:
        ValueError: also a model without routers, or with such as draw lots.
    """
    if is_megatron(load):  # an export has no use for these, which take seconds to import
        from megatron_mod.conversion.restore import restore_model
        from megatron_mod.conversion.source import open_source
        from megatron_mod.evaluation.megatron_backend import MegatronBackend

        source = open_source(load, base=base)
        work, folder, name = Work(source.base.arch, source.routing), source.step, MANIFEST
    else:
        folder, name = Path(load), "config.json"
        work = Work.of(read_config(load), folder / name)
    if work.routing is None or not work.routing.layers:
        raise ValueError(f"--load {load}: has no routers; give an export or a training run.")
    if work.routing.selection == "random":
        raise ValueError(
            f"--load {load}: its routers draw lots (router.selection = random), which no threshold "
            "changes; give a model that was trained with top_k or threshold."
        )
    if is_megatron(load):
        model = restore_model(source, ranks, dtype=getattr(torch, dtype))
        backend: Backend = MegatronBackend(*model, **settings)
    else:
        backend = open_huggingface(load, dtype, settings)
    return Routed(backend, work, folder, folder / name)
