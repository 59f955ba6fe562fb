"""Trains the routers of a frozen model."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_mod.config.cli import to_yaml
from megatron_mod.config.schema import Config
from megatron_mod.config.validate import check_batches
from megatron_mod.conversion import checkpoint as layout
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.hf_reader import read_config
from megatron_mod.data.dataset import Samples, load_data, write_rejects
from megatron_mod.data.loader import Loader
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.model.architecture import Architecture, check_parallel
from megatron_mod.model.builder import RoutedGPTModel, build_model, transformer_config
from megatron_mod.parallel import device, topology
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.training import checkpoint
from megatron_mod.training.average import RouterAverage
from megatron_mod.training.metrics import Metrics
from megatron_mod.training.optimizer import build_optimizer, wrap_ddp
from megatron_mod.training.step import StepResult, run_schedule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """A run whose settings have been checked against the model, the data and the world size."""

    arch: Architecture
    routing: RoutingConfig
    topology: topology.Topology
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
    base = Path(config.model.checkpoint)
    layout.read_manifest(base, kind="base")
    if Path(config.checkpoint.save).exists():
        raise ValueError(
            f"checkpoint.save = {config.checkpoint.save}: already exists; remove it or give "
            "another output folder."
        )
    hf_config = read_config(base / layout.HUGGINGFACE)
    arch = family_of(hf_config).architecture_of(hf_config)
    plan = topology.plan(
        tensor=p.tensor_model_parallel_size,
        pipeline=p.pipeline_model_parallel_size,
        world_size=topology.environment_world_size(),
    )
    check_parallel(
        arch,
        tensor=plan.tensor,
        pipeline=plan.pipeline,
        first_stage_layers=p.num_layers_in_first_pipeline_stage,
    )
    check_batches(
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_ranks=plan.data,
    )
    if config.data.max_length > arch.max_sequence_length:
        raise ValueError(
            f"data.max_length = {config.data.max_length}: the model reads at most "
            f"{arch.max_sequence_length} tokens (max_position_embeddings)."
        )
    routing = config.router.resolve(num_layers=arch.num_layers)
    tokenizer = load_tokenizer(
        config.data.tokenizer or base / layout.HUGGINGFACE, vocab_size=arch.vocab_size
    )
    train_data, validation = load_data(config.data, tokenizer, seed=config.train.seed)
    return Plan(arch, routing, plan, train_data, validation)


def describe(config: Config, plan: Plan) -> None:
    """Print what is about to run: ranks, model, and what of it trains (rank 0)."""
    if dist.get_rank() != 0:
        return
    t, routing = plan.topology, plan.routing
    print(
        f"{t.world_size} rank(s) on {device.describe()}: tensor {t.tensor} x pipeline {t.pipeline}"
        f" x data {t.data}\n"
        f"{plan.arch.num_layers} layers frozen in {config.model.dtype}; training "
        f"{len(routing.layers)} routers ({len(routing.layers) * plan.arch.hidden_size} parameters,"
        f" float32), {routing.granularity} on layers {list(routing.layers)}\n"
        f"{len(plan.train)} training and {len(plan.validation or ())} validation samples;"
        f" {config.train.steps} steps of {config.train.global_batch_size} sequences",
        flush=True,
    )


def train(config: Config, plan: Plan) -> dict:
    """Run the training and return its summary, which is also ``summary.json`` of the run."""
    run = Path(config.checkpoint.save)
    model, ddp, optimizer, scheduler = _build(config, plan)
    frozen = checkpoint.frozen_digests(model)
    controller = CapacityController(plan.routing, device=device.device())
    loaders = {"train": _loader(config, plan, plan.train)}
    if plan.validation:
        loaders["validation"] = _loader(config, plan, plan.validation)
    if dist.get_rank() == 0:
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        write_rejects(run / "rejects.jsonl", plan.train, plan.validation)
    dist.barrier()
    metrics = Metrics(run, plan.routing, steps=config.train.steps)
    average = RouterAverage(model.routers())

    def save(step: int) -> None:
        checkpoint.save_step(
            run,
            step=step,
            base=config.model.checkpoint,
            routing=plan.routing,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            state={"controller": controller.state_dict()},
        )

    for step in range(1, config.train.steps + 1):
        batch = loaders["train"].step(step - 1)
        learning_rate = optimizer.param_groups[0]["lr"] if optimizer.param_groups else 0.0
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        result = run_schedule(ddp, model, batch, plan.routing, controller=controller)
        _, grad_norm, _ = optimizer.step()
        scheduler.step(increment=1)
        metrics.add_tokens(batch.num_tokens, positions=batch.num_positions)
        last = step == config.train.steps
        saving = last or (config.checkpoint.interval and step % config.checkpoint.interval == 0)
        logging_step = last or step == 1 or step % config.logging.interval == 0
        if saving or logging_step:
            _require_finite(step, result, grad_norm)
        if logging_step:
            _log(metrics, step, result, controller, learning_rate, grad_norm)
        controller.end_step(result.capacity)
        if step > (1 - config.optimizer.average_fraction) * config.train.steps:
            average.update()
        if last:
            average.apply()
        interval = config.train.validation_interval
        if interval and (last or step % interval == 0):
            loss, capacity = validate(ddp, model, loaders["validation"], plan.routing)
            metrics.log_validation(step, loss=loss, capacity=capacity)
        if saving:
            save(step)
    if config.train.steps == 0:
        save(0)

    changed = checkpoint.count_changed(frozen, checkpoint.frozen_digests(model))
    summary = _summary(config, plan, metrics, changed)
    if dist.get_rank() == 0:
        checkpoint.write_json(run / "summary.json", summary)
    return summary


@torch.no_grad()
def validate(
    chunk: torch.nn.Module, model: RoutedGPTModel, loader: Loader, routing: RoutingConfig
) -> tuple[float, list[float]]:
    """Mean loss (nats per labelled token) and capacity per routed layer, with real skipping."""
    chunk.eval()
    loss, capacity, labels, sequences = 0.0, 0.0, 0, 0
    for batch in loader.passes():
        result = run_schedule(chunk, model, batch, routing, controller=None)
        loss = loss + result.task_loss * batch.num_labels
        capacity = capacity + result.capacity * batch.num_sequences
        labels, sequences = labels + batch.num_labels, sequences + batch.num_sequences
    chunk.train()
    return float(loss / labels), (capacity / sequences).tolist()


def _build(config: Config, plan: Plan) -> tuple:
    p = config.parallel
    megatron = transformer_config(
        plan.arch,
        dtype=DTYPES[config.model.dtype],
        tensor=plan.topology.tensor,
        pipeline=plan.topology.pipeline,
        first_stage_layers=p.num_layers_in_first_pipeline_stage,
        sequence_parallel=p.sequence_parallel,
    )
    model = build_model(plan.arch, megatron, plan.routing)
    checkpoint.load_base(model, config.model.checkpoint)
    ddp: DistributedDataParallel = wrap_ddp(
        model, use_distributed_optimizer=p.use_distributed_optimizer
    )
    optimizer, scheduler = build_optimizer(ddp, config)
    return model, ddp, optimizer, scheduler


def _loader(config: Config, plan: Plan, samples: Samples) -> Loader:
    return Loader(
        samples,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.train.seed,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_ranks=plan.topology.data,
        multiple=plan.topology.tensor if config.parallel.sequence_parallel else 1,
        row_length=config.data.max_length if config.data.packing else None,
        parts=samples.weights,
    )


def _require_finite(step: int, result: StepResult, grad_norm: float) -> None:
    """Stop before what has diverged is logged or saved."""
    loss = float(result.task_loss)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise ValueError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}: training has diverged; lower "
            "optimizer.lr or check the data. The checkpoints saved are from before this step."
        )


def _log(
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
    )


def _summary(config: Config, plan: Plan, metrics: Metrics, changed: int) -> dict:
    first, last = metrics.first or {}, metrics.last or {}
    return {
        "device": device.describe(),
        "world_size": plan.topology.world_size,
        "parallel": plan.topology.to_dict(),
        "train": {
            "steps": config.train.steps,
            "tokens": metrics.tokens,
            "tokens_per_second": metrics.tokens_per_second(),
            "padding": metrics.padding(),
            "loss_first": first.get("loss"),
            "loss_last": last.get("loss"),
            "trainable_parameters": len(plan.routing.layers) * plan.arch.hidden_size,
            "frozen_parameters_changed": changed,
        },
        "capacity_last": last.get("capacity"),
    }
