"""A model back from a checkpoint, ready to run at any topology."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mod.config.ranks import OPTIONS
from megatron_mod.conversion.load import load_base
from megatron_mod.conversion.routers import read_step
from megatron_mod.conversion.source import Source
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.model.architecture import check_parallel
from megatron_mod.model.builder import ModelChunks, build_model, transformer_config
from megatron_mod.parallel.topology import Topology


def restore_model(
    source: Source, ranks: Topology, *, dtype: torch.dtype = torch.float32
) -> tuple[ModelChunks, object]:
    """This rank's stage of a base checkpoint (dense) or of a training run (with its routers), and
    the tokenizer.

    Raises:
        ValueError: a topology that does not fit it.
    """
    base = source.base
    check_parallel(base.arch, tensor=ranks.tensor, pipeline=ranks.pipeline, names=OPTIONS)
    config = transformer_config(
        base.arch, dtype=dtype, tensor=ranks.tensor, pipeline=ranks.pipeline
    )
    model = build_model(base.arch, config, source.routing)
    load_base(model, base)
    if source.routing:
        put_routers(model, read_step(source.step, source.routing))
    return model, load_tokenizer(base.huggingface, vocab_size=base.arch.vocab_size)


@torch.no_grad()
def put_routers(model: ModelChunks, weights: dict[int, Tensor]) -> None:
    """Fill this stage's routers from weights ``[1, H]`` by layer."""
    for layer, router in model.routers().items():
        router.weight.copy_(weights[layer])
