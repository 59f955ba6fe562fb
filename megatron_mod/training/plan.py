"""What a training is to do, checked before it starts, and said when it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from megatron_mod.config.lora import LoraSettings
from megatron_mod.config.schema import Config
from megatron_mod.conversion.source import Base, open_model
from megatron_mod.data.dataset import Samples, load_data
from megatron_mod.data.loader import Loader
from megatron_mod.data.order import epoch_length, steps_of
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.model import fp8
from megatron_mod.model.cost import workload
from megatron_mod.model.specs import choose_implementation
from megatron_mod.model.trainable import BASE
from megatron_mod.monitoring.weights_and_biases import check_installed
from megatron_mod.parallel import device, topology
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.costs import Workload
from megatron_mod.training.given import fixed_routing, given_adapters
from megatron_mod.training.job import arrange, evenly
from megatron_mod.training.kernels import kernels
from megatron_mod.training.losses import CrossEntropy, Distillation, Loss
from megatron_mod.training.pipeline import Cut, cut
from megatron_mod.training.resume import check_settings

SAMPLES = 256  # that say how long documents are, and how much of them is labelled
ROWS = 4  # a step, for every rank and stage that packed rows are shared out to
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
    packing: bool
    """Whether a row holds several documents."""
    steps: int
    """Of the whole run."""
    workload: Workload
    """What is computed of documents like the training's."""
    lora: LoraSettings | None = None
    cut: Cut | None = None
    dense_passes: int = 0
    """Forward passes of the dense model beside each step's, for the loss."""
    is_whole: bool = False
    """Whether all of the model trains, and its steps hold all of it."""
    goes_on: dict | None = None
    """The manifest of a step of this run that holds the whole model, which is then the base."""


def prepare(config: Config) -> Plan:
    """Check everything that can be checked before ranks meet, and read the data.

    Raises:
        ValueError: naming the field, its value, the constraint and the remedy.
    """
    check_installed(config.logging)
    wanted, dtype = config.model.transformer_impl, DTYPES[config.model.dtype]
    implementation = choose_implementation(wanted, dtype=dtype)
    fp8.require_device(config.model.fp8, implementation)
    base, goes_on = open_model(config)
    arch = base.arch
    check_settings(config)
    job = arrange(
        config,
        arch,
        world_size=topology.environment_world_size(),
        routing=fixed_routing(config, arch, base=base.path),
        lora=given_adapters(config, arch),
    )
    routing, plan, computed = job.routing, job.topology, job.computed
    tokenizer = load_tokenizer(
        config.data.tokenizer or base.huggingface, vocab_size=arch.vocab_size
    )
    train_data, validation = load_data(config.data, tokenizer, seed=config.train.seed)
    if routing.pooling == "prompt":
        _require_prompts(train=train_data, validation=validation)
    loss = LOSSES[config.train.loss]()
    few = train_data.draw(SAMPLES, seed=config.train.seed)
    lengths = [len(sample.ids) for sample in few]
    counted = workload(arch, routing, lengths)
    if routing.work is not None and "routers" in config.train.parts:
        _check_work(routing, counted, mean_length=sum(lengths) / len(lengths))
        routing = evenly(routing, counted)
    packing = _packs(config, plan, few)
    pipeline = cut(
        config,
        arch,
        routing,
        plan,
        few,
        asked=job.asked_layout,
        dense_passes=job.dense_passes,
        num_free_layers=computed.start,
        packing=packing,
        lora=job.lora,
    )
    if pipeline:
        plan = replace(plan, pipeline_layout=pipeline.layout)
    return Plan(
        base=base,
        routing=routing,
        topology=plan,
        implementation=implementation,
        train=train_data,
        validation=validation,
        loss=loss,
        computed=computed,
        packing=packing,
        steps=_steps(config, train_data),
        lora=job.lora,
        cut=pipeline,
        dense_passes=job.dense_passes,
        workload=counted,
        is_whole=BASE in config.train.parts,
        goes_on=goes_on,
    )


def _check_work(routing: RoutingConfig, counted: Workload, *, mean_length: float) -> None:
    """Refuse a budget that cannot be met on documents of the training's lengths."""
    least = counted.work(0.0)
    assert routing.least_work is not None
    if routing.least_work < least:
        keys = ", router.keys_values: selected" * (routing.keys_values == "all")
        layers = f"{len(routing.layers)} layer{'s' * (len(routing.layers) > 1)}"
        raise ValueError(
            f"router.work = {routing.least_work:g}: skipping everything that is routed, "
            f"{routing.granularity} on {layers}, leaves {least:.3f} of the "
            f"dense model's operations at this data's lengths ({mean_length:.0f} tokens in the "
            f"mean); ask for no less, or route more (router.layers: all, a block granularity"
            f"{keys})."
        )


def _steps(config: Config, samples: Samples) -> int:
    train = config.train
    if train.epochs is None:
        assert train.steps is not None, "a configuration without a length"
        return train.steps
    samples_of_epoch = epoch_length(samples.weights)
    return steps_of(train.epochs, samples=samples_of_epoch, batch=train.global_batch_size)


def _packs(config: Config, ranks: topology.Topology, samples: Samples) -> bool:
    """What ``data.packing`` says; of ``auto``, whether it pays: matrix products grow where a row
    has room for several documents, but ranks and stages wait where they share out few rows."""
    if config.data.packing != "auto":
        return config.data.packing
    mean_length = sum(len(sample.ids) for sample in samples) / len(samples)
    documents = config.data.max_length / mean_length  # of a row
    rows, sharing = config.train.global_batch_size / documents, ranks.data * ranks.pipeline
    enough = sharing == 1 or rows >= ROWS * sharing
    return ranks.context == 1 and documents >= 2 and enough


def _require_prompts(**samples: Samples | None) -> None:
    for field, found in samples.items():
        if found is not None and found.has_texts:
            raise ValueError(
                f"router.pooling = prompt: data.{field} has texts, which have no prompts for a "
                "sequence's decision to see; set router.pooling to all, or give conversations only."
            )


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
        row_length=config.data.max_length if plan.packing else None,
        parts=samples.weights,
    )


def row_multiple(ranks: topology.Topology) -> int:
    """What the length of rows is a multiple of, for the ranks that share a sequence."""
    return (ranks.tensor if ranks.sequence_parallel else 1) * (
        2 * ranks.context if ranks.context > 1 else 1
    )


def description(config: Config, plan: Plan, *, parameters: int) -> str:
    """What is about to run: ranks, model, and what of it trains, so many ``parameters``."""
    t, arch, kept = plan.topology, plan.base.arch, plan.computed.start
    share = 100 * parameters / arch.num_parameters
    state = f"frozen in {config.model.dtype}"
    numbers = f"float32; {share:.2g} % of the model's {arch.num_parameters}"
    if plan.is_whole:
        state, numbers = f"in {config.model.dtype}", "stepped in float32"
    return (
        f"{t.world_size} rank(s) on {device.describe()}: tensor {t.tensor} x pipeline {t.pipeline}"
        f"{f' x context {t.context}' if t.context > 1 else ''} x data {t.data}"
        f"{f', experts shared by {t.expert}' if t.expert > 1 else ''}\n"
        f"{arch.num_layers} layers ({plan.implementation}{_products(config)}) {state};"
        f" training {_what_trains(config, plan)} ({parameters} parameters, {numbers})"
        f"{_what_else(config, plan)}\n"
        f"{', '.join(f'{part}: {code}' for part, code in kernels(plan.implementation).items())}\n"
        + (f"{plan.cut}\n" if plan.cut else "")
        + (f"what enters layer {kept}{_why(plan)} is read from the prefix cache\n" if kept else "")
        + f"{len(plan.train)} training and {len(plan.validation or ())} validation samples;"
        f" {plan.steps} steps of {config.train.global_batch_size} sequences"
        f"{', several in a row' if plan.packing else ''}"
        + (f" (train.epochs = {config.train.epochs:g})" if config.train.epochs else "")
    )


def _products(config: Config) -> str:
    return f", products in FP8, {config.model.fp8}" if config.model.fp8 else ""


def _what_trains(config: Config, plan: Plan) -> str:
    """Its parts; of routers how many."""
    routers = f"{len(plan.routing.places)} routers"
    if plan.is_whole:
        return f"all of it{f' with {routers}' if plan.routing.places else ''}"
    of = {"routers": routers, "stand_ins": "stand-ins"}
    return "+".join(of.get(part, part) for part in config.train.parts)


def _what_else(config: Config, plan: Plan) -> str:
    """Where routers are, and adapters."""
    routing, lora, found = plan.routing, plan.lora, ""
    if routing.layers:
        fixed = "" if "routers" in config.train.parts else "routers as they are, "
        found += f", {fixed}{routing.granularity} on layers {list(routing.layers)}"
    if lora is not None:
        found += (
            f", adapters of rank {lora.rank} on {' '.join(lora.targets)} of layers "
            f"{list(lora.layers)}"
        )
    return found


def _why(plan: Plan) -> str:
    """Why the prefix ends where it does, if no router is there."""
    is_adapted = plan.lora is not None and plan.computed.start == plan.lora.layers[0]
    return ", the first with adapters," if is_adapted else ""
