"""Trains the routers of a frozen model."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mod.config.cli import to_yaml
from megatron_mod.config.model_folder import CONFIG
from megatron_mod.config.schema import Config
from megatron_mod.config.validate import check_batches
from megatron_mod.conversion.source import Base, open_base
from megatron_mod.data.dataset import Samples, load_data, write_rejects
from megatron_mod.data.loader import Loader
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.folders import write_durably
from megatron_mod.model.architecture import check_parallel
from megatron_mod.model.builder import ModelChunks, build_model, transformer_config
from megatron_mod.model.specs import choose_implementation
from megatron_mod.parallel import device, topology
from megatron_mod.parallel.agree import largest, on_first_rank
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.training import checkpoint
from megatron_mod.training.average import RouterAverage
from megatron_mod.training.ending import next_steps
from megatron_mod.training.faults import FaultCounter, not_finite
from megatron_mod.training.metrics import Metrics
from megatron_mod.training.optimizer import build_optimizer, wrap_ddp
from megatron_mod.training.resume import Run, check_settings
from megatron_mod.training.run_folder import RunFolder
from megatron_mod.training.signals import StopRequest, stopped
from megatron_mod.training.start import start_routers
from megatron_mod.training.step import StepResult, run_schedule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """A run whose settings have been checked against the model, the data and the world size."""

    base: Base
    routing: RoutingConfig
    topology: topology.Topology
    implementation: str
    train: Samples
    validation: Samples | None


def prepare(config: Config) -> Plan:
    """Check everything that can be checked before ranks meet, and read the data.

    Raises:
        ValueError: naming the field, its value, the constraint and the remedy.
    """
    if int(os.environ.get("RANK", 0)):  # what is said about the data is said once
        logging.getLogger("megatron_mod").setLevel(logging.ERROR)
    p = config.parallel
    implementation = choose_implementation(config.model.transformer_impl)
    base = open_base(config.model.checkpoint or config.model.hf_path, hf_path=config.model.hf_path)
    arch = base.arch
    check_settings(config)
    plan = topology.plan(
        tensor=p.tensor_model_parallel_size,
        pipeline=p.pipeline_model_parallel_size,
        context=p.context_parallel_size,
        virtual_pipeline=p.virtual_pipeline_model_parallel_size,
        world_size=topology.environment_world_size(),
    )
    check_parallel(
        arch,
        tensor=plan.tensor,
        pipeline=plan.pipeline,
        virtual_pipeline=plan.virtual_pipeline,
        first_stage_layers=p.num_layers_in_first_pipeline_stage,
    )
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
    routing = config.router.resolve(num_layers=arch.num_layers)
    tokenizer = load_tokenizer(
        config.data.tokenizer or base.huggingface, vocab_size=arch.vocab_size
    )
    train_data, validation = load_data(config.data, tokenizer, seed=config.train.seed)
    return Plan(base, routing, plan, implementation, train_data, validation)


def describe(config: Config, plan: Plan) -> None:
    """Print what is about to run: ranks, model, and what of it trains (rank 0)."""
    if dist.get_rank() != 0:
        return
    t, routing, arch = plan.topology, plan.routing, plan.base.arch
    print(
        f"{t.world_size} rank(s) on {device.describe()}: tensor {t.tensor} x pipeline {t.pipeline}"
        f"{f' x context {t.context}' if t.context > 1 else ''} x data {t.data}\n"
        f"{arch.num_layers} layers ({plan.implementation}) frozen in {config.model.dtype};"
        f" training {len(routing.layers)} routers"
        f" ({len(routing.layers) * arch.hidden_size} parameters, float32),"
        f" {routing.granularity} on layers {list(routing.layers)}\n"
        f"{len(plan.train)} training and {len(plan.validation or ())} validation samples;"
        f" {config.train.steps} steps of {config.train.global_batch_size} sequences",
        flush=True,
    )


def train(config: Config, plan: Plan) -> dict:
    """Run the training, or go on with it where an earlier job stopped.

    Returns the summary, which is also ``summary.json`` of the run.
    """
    folder = RunFolder(config.checkpoint)
    with folder.held():
        run = Run(config, folder, plan.base, plan.routing, data=plan.train.identity)
        summary = _train(config, plan, run)
        on_first_rank(lambda: checkpoint.write_json(folder.path / "summary.json", summary))
    topology.print_once(next_steps(config, steps=config.train.steps))
    return summary


def _train(config: Config, plan: Plan, run: Run) -> dict:
    model, chunks, optimizer, scheduler = _build(config, plan)
    frozen = checkpoint.frozen_digests(model)
    controller = CapacityController(plan.routing, device=device.device())
    loaders = {"train": _loader(config, plan, plan.train)}
    if plan.validation:
        loaders["validation"] = _loader(config, plan, plan.validation)
    metrics = Metrics(
        run.folder.path,
        plan.routing,
        steps=config.train.steps,
        on_error=config.checkpoint.on_save_error,
    )
    average = RouterAverage(model.routers())
    faults = FaultCounter(most_in_a_row=config.train.max_skipped_steps)
    state = checkpoint.RunState(model, optimizer, scheduler, controller, average, metrics, faults)
    start = run.resume(state)
    on_first_rank(lambda: write_durably(run.folder.path / CONFIG, to_yaml(config)))
    rejects = run.folder.path / "rejects.jsonl"
    on_first_rank(lambda: write_rejects(rejects, plan.train, plan.validation))

    stop = StopRequest()

    def validate_if_due(step: int) -> int:
        """Validate after some steps and the last; the signal that stopped the ranks in it, or 0."""
        interval, last = config.train.validation_interval, step == config.train.steps
        if not interval or not (last or step % interval == 0):
            return 0
        topology.at(f"the validation after step {step}")
        with average.applied(when=last):
            measured = validate(chunks, model, loaders["validation"], plan.routing, stop=stop)
        if isinstance(measured, int):
            return measured
        metrics.log_validation(step, loss=measured[0], capacity=measured[1])
        return 0

    def leave(asked: int, step: int) -> NoReturn:
        raise stopped(asked, step=step, steps=config.train.steps, run=run.folder.path)

    if start and not metrics.has_validation(start) and (asked := validate_if_due(start)):
        leave(asked, start)
    for step in range(start + 1, config.train.steps + 1):
        topology.at(f"step {step}")
        batch = loaders["train"].step(step - 1)
        controller.start_step((step - 1) / config.train.steps)
        learning_rate = optimizer.param_groups[0]["lr"] if optimizer.param_groups else 0.0
        for chunk in chunks:
            chunk.zero_grad_buffer()
        check = config.router.check_decisions_interval
        for layer in model.routed_layers().values():
            layer.check_decisions = bool(check) and step % check == 0
        optimizer.zero_grad()
        result = run_schedule(chunks, model, batch, plan.routing, controller=controller)
        wrong, asked = largest(not_finite(result.task_loss, model), stop.asked)
        sources = partial(loaders["train"].sources, step - 1)
        skipped = faults.skips(step, finite=not wrong, loss=result.task_loss, samples=sources)
        grad_norm = 0.0 if skipped else optimizer.step()[1]
        scheduler.step(increment=1)
        metrics.add_tokens(batch.num_tokens, positions=batch.num_positions)
        last = step == config.train.steps
        if skipped:
            metrics.log_skipped(step, samples=sources())
        elif last or step == 1 or step % config.logging.interval == 0:
            _log(config, metrics, step, result, controller, learning_rate, grad_norm)
        if not skipped:
            controller.end_step(result.capacity)
        if step > (1 - config.optimizer.average_fraction) * config.train.steps:
            average.update()
        asked = asked or validate_if_due(step)
        interval = config.checkpoint.interval
        if asked or last or (interval and step % interval == 0):
            topology.at(f"the checkpoint of step {step}")
            run.save(step, state, leaving=bool(asked))
            asked = asked or (not last and stop.agreed())
        if asked:
            leave(asked, step)
    if config.train.steps == 0:
        run.save(0, state)

    changed = checkpoint.count_changed(frozen, checkpoint.frozen_digests(model))
    return _summary(config, plan, metrics, faults, changed)


@torch.no_grad()
def validate(
    chunks: list[torch.nn.Module],
    model: ModelChunks,
    loader: Loader,
    routing: RoutingConfig,
    *,
    stop: StopRequest,
) -> tuple[float, list[float]] | int:
    """Mean loss (nats per labelled token) and capacity per routed layer, with real skipping.

    Or the signal that the ranks broke off for.
    """
    model.eval()
    loss, capacity, labels, units = 0.0, 0.0, 0, 0
    for batch in loader.passes():
        if asked := stop.agreed():
            return asked
        result = run_schedule(chunks, model, batch, routing, controller=None)
        loss = loss + result.task_loss * batch.num_labels
        num_units = batch.num_sequences if routing.per_sequence else batch.num_tokens
        capacity = capacity + result.capacity * num_units
        labels, units = labels + batch.num_labels, units + num_units
    model.train()
    return float(loss / labels), (capacity / units).tolist()


def _build(config: Config, plan: Plan) -> tuple:
    p = config.parallel
    megatron = transformer_config(
        plan.base.arch,
        dtype=DTYPES[config.model.dtype],
        tensor=plan.topology.tensor,
        pipeline=plan.topology.pipeline,
        virtual_pipeline=plan.topology.virtual_pipeline,
        context=plan.topology.context,
        first_stage_layers=p.num_layers_in_first_pipeline_stage,
        sequence_parallel=p.sequence_parallel,
    )
    model = build_model(plan.base.arch, megatron, plan.routing, implementation=plan.implementation)
    checkpoint.load_base(model, plan.base)
    start_routers(model, config, plan.base, plan.routing)
    chunks = wrap_ddp(model, use_distributed_optimizer=p.use_distributed_optimizer)
    optimizer, scheduler = build_optimizer(chunks, config)
    return model, chunks, optimizer, scheduler


def _loader(config: Config, plan: Plan, samples: Samples) -> Loader:
    ranks = plan.topology
    return Loader(
        samples,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.train.seed,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_ranks=ranks.data,
        multiple=(ranks.tensor if config.parallel.sequence_parallel else 1)
        * (2 * ranks.context if ranks.context > 1 else 1),
        group=ranks.pipeline if ranks.virtual_pipeline else 1,
        row_length=config.data.max_length if config.data.packing else None,
        parts=samples.weights,
    )


def _log(
    config: Config,
    metrics: Metrics,
    step: int,
    result: StepResult,
    controller: CapacityController,
    learning_rate: float,
    grad_norm: float,
) -> None:
    task_loss = float(result.task_loss)
    metrics.log(
        step,
        loss=task_loss + float(controller.penalty(result.capacity)),
        task_loss=task_loss,
        capacity=result.capacity.tolist(),
        learning_rate=learning_rate,
        grad_norm=float(grad_norm),
        data_position=step * config.train.global_batch_size,
    )


def _summary(
    config: Config, plan: Plan, metrics: Metrics, faults: FaultCounter, changed: int
) -> dict:
    first, last = metrics.first or {}, metrics.last or {}
    return {
        "device": device.describe(),
        "world_size": plan.topology.world_size,
        "parallel": plan.topology.to_dict(),
        "train": {
            "steps": config.train.steps,
            "skipped_steps": faults.skipped,
            "tokens": metrics.tokens,
            "tokens_per_second": metrics.tokens_per_second(),
            "padding": metrics.padding(),
            "loss_first": first.get("loss"),
            "loss_last": last.get("loss"),
            "trainable_parameters": len(plan.routing.layers) * plan.base.arch.hidden_size,
            "frozen_parameters_changed": changed,
        },
        "capacity_last": last.get("capacity"),
    }
