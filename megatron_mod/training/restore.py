"""A model back from a checkpoint, ready to run at any topology."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_mod.conversion import checkpoint as layout
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.hf_reader import read_config
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.model.architecture import check_parallel
from megatron_mod.model.builder import ModelChunks, build_model, transformer_config
from megatron_mod.parallel.topology import Topology
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.training import checkpoint


def restore_model(
    load: str | Path, ranks: Topology, *, dtype: torch.dtype = torch.float32
) -> tuple[ModelChunks, object]:
    """This rank's stage of a base checkpoint (dense) or of a training run (with its routers), and
    the tokenizer.

    Raises:
        ValueError: no such checkpoint, or a topology that does not fit it.
    """
    step = layout.resolve_step(load)
    manifest = layout.read_manifest(step)
    routed = manifest["kind"] == "routers"
    base = Path(manifest["base"]) if routed else step
    hf_config = read_config(base / layout.HUGGINGFACE)
    arch = family_of(hf_config).architecture_of(hf_config)
    check_parallel(arch, tensor=ranks.tensor, pipeline=ranks.pipeline)
    config = transformer_config(arch, dtype=dtype, tensor=ranks.tensor, pipeline=ranks.pipeline)
    routing = RoutingConfig.from_dict(manifest["routing"]) if routed else None
    model = build_model(arch, config, routing)
    checkpoint.load_base(model, base)
    if routed:
        checkpoint.load_routers(model, step)
    return model, load_tokenizer(base / layout.HUGGINGFACE, vocab_size=arch.vocab_size)
