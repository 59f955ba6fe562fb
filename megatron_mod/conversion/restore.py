"""A model back from a checkpoint, ready to run at any topology."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_mod.checkpoint.distributed import load_state
from megatron_mod.checkpoint.manifest import STATE, read_manifest
from megatron_mod.config.ranks import OPTIONS
from megatron_mod.conversion.finite import require_finite
from megatron_mod.conversion.load import load_base
from megatron_mod.conversion.source import Source
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.model.architecture import check_parallel
from megatron_mod.model.builder import ModelChunks, build_model, transformer_config
from megatron_mod.model.trainable import AVERAGE, Trainable
from megatron_mod.parallel.agree import together
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
        load_trained(model, source.step)
    return model, load_tokenizer(base.huggingface, vocab_size=base.arch.vocab_size)


def load_trained(model: ModelChunks, step: Path) -> None:
    """Fill what trains from a step of a training run, averaged if the training averaged it; called
    by all ranks alike.

    Raises:
        ValueError: the step lacks some of it, or it is not finite; on all ranks.
    """
    trainable = Trainable(model)
    prefix = AVERAGE if read_manifest(step).get("averaged") else ""
    wanted = trainable.sharded(prefix=prefix)
    loaded = load_state(wanted, step / STATE)
    with together():
        for key, tensor in loaded.items():
            require_finite(tensor, key, where=step / STATE)
    trainable.put({key.removeprefix(prefix): tensor for key, tensor in loaded.items()})


@torch.no_grad()
def put_routers(model: ModelChunks, weights: dict[int, Tensor]) -> None:
    """Fill this stage's routers from weights ``[1, H]`` by layer."""
    for layer, router in model.routers().items():
        router.weight.copy_(weights[layer])
