"""Models to evaluate, from the folders that users name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_mod.config.model_folder import is_megatron
from megatron_mod.evaluation.backend import Backend

if TYPE_CHECKING:
    from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend
    from megatron_mod.parallel.topology import Topology


def load_backend(
    load: str | Path,
    ranks: Topology,
    *,
    dtype: str,
    base: str | None = None,
    trust_remote_code: bool = False,
    **settings,
) -> Backend:
    """A backend on a Hugging Face folder, a base checkpoint or a training run; called by all ranks.

    Args:
        dtype: ``float32`` or ``bfloat16``.
        trust_remote_code: run the code that a Hugging Face folder brings.
        base: where the base of a training run is now, if not where it was.
        settings: ``max_length``, ``batch_size``, ``pooling`` and ``selection`` of ``Backend``.

    Raises:
        ValueError: nothing of the kind, or a setting that does not fit the model.
    """
    if is_megatron(load):  # each kind imports what the other has no use for
        from megatron_mod.conversion.restore import restore_model
        from megatron_mod.conversion.source import open_source
        from megatron_mod.evaluation.megatron_backend import MegatronBackend

        model = restore_model(open_source(load, base=base), ranks, dtype=getattr(torch, dtype))
        return MegatronBackend(*model, **settings)
    return open_huggingface(load, dtype, settings, trust_remote_code=trust_remote_code)


def open_huggingface(
    load: str | Path, dtype: str, settings: dict, *, trust_remote_code: bool = False
) -> HuggingFaceBackend:
    """A backend on a Hugging Face folder, whole on every rank; arguments of ``load_backend``."""
    from megatron_mod.evaluation.huggingface import load_huggingface
    from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend

    model, tokenizer = load_huggingface(
        load, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
    )
    shared = {"data_rank": dist.get_rank(), "data_ranks": dist.get_world_size()}
    return HuggingFaceBackend(model, tokenizer, **settings, **shared)
