"""A model from a checkpoint, ready to train or to run at any topology."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_mod.checkpoint.distributed import StateReader, load_state
from megatron_mod.checkpoint.manifest import STATE, read_manifest
from megatron_mod.config.lora import LoraSettings
from megatron_mod.config.ranks import OPTIONS
from megatron_mod.conversion.finite import require_finite
from megatron_mod.conversion.load import load_base
from megatron_mod.conversion.routers import Added
from megatron_mod.conversion.source import Base, Source
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.model.architecture import check_parallel
from megatron_mod.model.builder import ModelChunks, build_model, transformer_config
from megatron_mod.model.fp8 import why_not
from megatron_mod.model.specs import choose_implementation, why_not_transformer_engine
from megatron_mod.model.trainable import AVERAGE, ROUTERS, Trainable
from megatron_mod.parallel.agree import together
from megatron_mod.parallel.topology import Topology, print_once
from megatron_mod.routing.config import RoutingConfig


def load_model(
    base: Base,
    routing: RoutingConfig | None,
    ranks: Topology,
    *,
    implementation: str,
    dtype: torch.dtype = torch.float32,
    trained: Sequence[str] = (ROUTERS,),
    computed: range | None = None,
    recompute: str = "none",
    fp8: str | None = None,
    lora: LoraSettings | None = None,
    filled: bool = True,
) -> ModelChunks:
    """This rank's part of a base, with new routers where ``routing`` wants them and new adapters
    where ``lora`` does, if they do; called by all ranks alike. Whatever runs a model gets it from
    here.

    Args:
        ranks: a layout that fits the model (``check_parallel``).
        implementation: see ``specs.choose_implementation``.
        dtype: of the weights; what is added to them is fp32.
        trained: the parts that train (see ``model/trainable.py``).
        computed: the layers that it computes, all without it; nothing is read of the others (see
            ``build_model``).
        recompute: what backward computes again (see ``model/recompute.py``).
        fp8: the format of products by frozen weights (see ``model/fp8.py``); ``None``: the dtype.
        filled: with the base's weights, or with nothing that is meant, to be filled later.

    Raises:
        ValueError: a base that is damaged or not whole; see ``load_base``.
    """
    config = transformer_config(base.arch, ranks, dtype=dtype, recompute=recompute, fp8=fp8)
    model = build_model(
        base.arch,
        config,
        routing,
        implementation=implementation,
        trained=trained,
        computed=computed,
        lora=lora,
    )
    if filled:
        load_base(model, base)
    return model


def restore_model(
    source: Source,
    ranks: Topology,
    *,
    implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
    fp8: str | None = None,
) -> tuple[ModelChunks, object]:
    """This rank's stage of a base checkpoint (dense) or of a training run (with its routers and
    adapters), and the tokenizer.

    Args:
        implementation: ``None``: what the training ran, where it can work, and ``local`` otherwise,
            which is said; what a training would run here, of a base.
        fp8: the format of products; ``None``: what the training had, where nothing else is said
            about layers and dtype and it can work.

    Raises:
        ValueError: a topology that does not fit it.
    """
    base = source.base
    check_parallel(
        base.arch,
        tensor=ranks.tensor,
        pipeline=ranks.pipeline,
        virtual_pipeline=ranks.virtual_pipeline,
        expert=ranks.expert,
        names=OPTIONS,
    )
    if implementation is None:
        implementation = _implementation(source, dtype)
        fp8 = fp8 or _fp8(source, implementation, dtype)
    model = load_model(
        base,
        source.routing,
        ranks,
        implementation=implementation,
        dtype=dtype,
        fp8=fp8,
        lora=source.lora,
    )
    if source.step:
        load_trained(model, source.step)
    return model, load_tokenizer(base.huggingface, vocab_size=base.arch.vocab_size)


def _implementation(source: Source, dtype: torch.dtype) -> str:
    """What the training ran, where it can work; what a training would run, where none is noted."""
    ran = read_manifest(source.step).get("implementation") if source.step else None
    if ran == "transformer_engine" and (reason := why_not_transformer_engine()):
        print_once(
            f"{source.step}: trained with Transformer Engine, which cannot work here ({reason}); "
            "its layers run as local, which is equal to rounding.",
            level=logging.WARNING,
        )
        return "local"
    return ran or choose_implementation(dtype=dtype)


def _fp8(source: Source, implementation: str, dtype: torch.dtype) -> str | None:
    """What the training's products were in, where that can work; not in float32, which asks for
    more."""
    ran = read_manifest(source.step).get("fp8") if source.step else None
    if ran is None or dtype == torch.float32:
        return None
    if reason := why_not(implementation):
        print_once(
            f"{source.step}: trained with products in FP8 ({ran}), which cannot work here "
            f"({reason}); they are computed in {str(dtype).removeprefix('torch.')}.",
            level=logging.WARNING,
        )
        return None
    return ran


def load_trained(model: ModelChunks, step: Path) -> None:
    """Fill what was added to the base from a step of a training run, averaged if the training
    averaged it; called by all ranks alike.

    Raises:
        ValueError: the step lacks some of it, or it is not finite; on all ranks.
    """
    trainable = Trainable(model)
    held, averaged = StateReader(step / STATE).names(), read_manifest(step).get("averaged")
    kept = trainable.kept
    mean = {key: kept.pop(key) for key in list(kept) if averaged and AVERAGE + key in held}
    wanted = {**trainable.sharded(kept), **trainable.sharded(mean, prefix=AVERAGE)}
    loaded = load_state(wanted, step / STATE)
    with together():
        for key, tensor in loaded.items():
            require_finite(tensor, key, where=step / STATE)
    trainable.put({key.removeprefix(AVERAGE): tensor for key, tensor in loaded.items()})


@torch.no_grad()
def put_added(model: ModelChunks, added: Added) -> None:
    """Fill this stage's routed layers with what was read of them."""
    for layer, module in model.routed_layers().items():
        parameters = dict(module.named_parameters())
        for name, tensor in added[layer].items():
            parameters[name].copy_(tensor)
