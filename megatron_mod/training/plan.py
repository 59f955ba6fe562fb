"""What a training is to do, checked before it starts, and said when it does."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from megatron_mod.config.schema import Config
from megatron_mod.config.validate import check_batches
from megatron_mod.conversion.source import Base, open_base
from megatron_mod.data.dataset import Samples, load_data
from megatron_mod.data.loader import Loader
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.model.architecture import check_parallel
from megatron_mod.model.specs import choose_implementation
from megatron_mod.parallel import device, topology
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.training.losses import CrossEntropy, Distillation, Loss
from megatron_mod.training.pipeline import Cut, asked_layout, cut
from megatron_mod.training.resume import check_settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOSSES: dict[str, Callable[[], Loss]] = {
    "task": CrossEntropy,
    "distill": Distillation,
    "both": partial(Distillation, with_cross_entropy=True),
}


@dataclass(frozen=True)
class Plan:
    """A run whose settings have been checked against the model, the data and the world size."""

    base: Base
    routing: RoutingConfig
    topology: topology.Topology
    implementation: str
    train: Samples
    validation: Samples | None
    loss: Loss
    computed: range
    """The layers that training computes; the states that enter the first of them are kept."""
    cut: Cut | None = None


def prepare(config: Config) -> Plan:
    """Check everything that can be checked before ranks meet, and read the data.

    Raises:
        ValueError: naming the field, its value, the constraint and the remedy.
    """
    if int(os.environ.get("RANK", 0)):  # what is said about the data is said once
        logging.getLogger("megatron_mod").setLevel(logging.ERROR)
    p = config.parallel
    wanted, dtype = config.model.transformer_impl, DTYPES[config.model.dtype]
    implementation = choose_implementation(wanted, dtype=dtype)
    base = open_base(config.model.checkpoint or config.model.hf_path, hf_path=config.model.hf_path)
    arch = base.arch
    check_settings(config)
    routing = config.router.resolve(num_layers=arch.num_layers, hidden_size=arch.hidden_size)
    computed = _computed(config, routing, num_layers=arch.num_layers)
    plan = topology.plan(
        tensor=p.tensor_model_parallel_size,
        pipeline=p.pipeline_model_parallel_size,
        context=p.context_parallel_size,
        virtual_pipeline=p.virtual_pipeline_model_parallel_size,
        world_size=topology.environment_world_size(),
        sequence_parallel=p.sequence_parallel,
    )
    check_parallel(
        arch,
        tensor=plan.tensor,
        pipeline=plan.pipeline,
        virtual_pipeline=plan.virtual_pipeline,
    )
    asked = asked_layout(p, arch)
    check_batches(
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_ranks=plan.data,
        pipeline=plan.pipeline if plan.virtual_pipeline else 1,
    )
    if config.data.max_length > arch.max_sequence_length:
        raise ValueError(
            f"data.max_length = {config.data.max_length}: the model reads at most "
            f"{arch.max_sequence_length} tokens (max_position_embeddings)."
        )
    tokenizer = load_tokenizer(
        config.data.tokenizer or base.huggingface, vocab_size=arch.vocab_size
    )
    train_data, validation = load_data(config.data, tokenizer, seed=config.train.seed)
    if routing.pooling == "prompt":
        _require_prompts(train=train_data, validation=validation)
    loss = LOSSES[config.train.loss]()
    dense_passes = int(config.train.loss != "task")
    pipeline = cut(
        config,
        arch,
        routing,
        plan,
        train_data,
        asked=asked,
        dense_passes=dense_passes,
        num_free_layers=computed.start,
    )
    if pipeline:
        plan = replace(plan, pipeline_layout=pipeline.layout)
    return Plan(
        base, routing, plan, implementation, train_data, validation, loss, computed, pipeline
    )


def _require_prompts(**samples: Samples | None) -> None:
    for field, found in samples.items():
        if found is not None and found.has_texts:
            raise ValueError(
                f"router.pooling = prompt: data.{field} has texts, which have no prompts for a "
                "sequence's decision to see; set router.pooling to all, or give conversations only."
            )


def _computed(config: Config, routing: RoutingConfig, *, num_layers: int) -> range:
    """Without the layers before the first routed one, if what they compute is kept."""
    if config.train.frozen_prefix == "recompute":
        return range(num_layers)
    first = min(routing.layers)
    if first == 0:
        raise ValueError(
            f"train.frozen_prefix = cache: layer 0 is routed (router.layers = "
            f"{config.router.layers}), so there is nothing before the first routed layer to keep; "
            "set it to recompute, or route deeper layers."
        )
    return range(first, num_layers)


def make_loader(config: Config, plan: Plan, samples: Samples, *, data_rank: int) -> Loader:
    """The steps of this data-parallel rank."""
    ranks = plan.topology
    return Loader(
        samples,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.train.seed,
        data_rank=data_rank,
        data_ranks=ranks.data,
        multiple=row_multiple(ranks),
        group=ranks.pipeline if ranks.virtual_pipeline else 1,
        row_length=config.data.max_length if config.data.packing else None,
        parts=samples.weights,
    )


def row_multiple(ranks: topology.Topology) -> int:
    """What the length of rows is a multiple of, for the ranks that share a sequence."""
    return (ranks.tensor if ranks.sequence_parallel else 1) * (
        2 * ranks.context if ranks.context > 1 else 1
    )


def description(config: Config, plan: Plan, *, parameters: int) -> str:
    """What is about to run: ranks, model, and what of it trains, so many ``parameters``."""
    t, routing, arch, kept = plan.topology, plan.routing, plan.base.arch, plan.computed.start
    return (
        f"{t.world_size} rank(s) on {device.describe()}: tensor {t.tensor} x pipeline {t.pipeline}"
        f"{f' x context {t.context}' if t.context > 1 else ''} x data {t.data}\n"
        f"{arch.num_layers} layers ({plan.implementation}) frozen in {config.model.dtype};"
        f" training {len(routing.layers)} {config.train.trainable.replace('_', '-')}"
        f" ({parameters} parameters, float32), {routing.granularity} on layers"
        f" {list(routing.layers)}\n"
        + (f"{plan.cut}\n" if plan.cut else "")
        + (f"what enters layer {kept} is read from the prefix cache\n" if kept else "")
        + f"{len(plan.train)} training and {len(plan.validation or ())} validation samples;"
        f" {config.train.steps} steps of {config.train.global_batch_size} sequences"
    )
