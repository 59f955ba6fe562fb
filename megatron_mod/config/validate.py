"""What is refused at start, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mod.config.schema import Config


def check_values(config: Config) -> None:
    """Refuse values out of range and settings that would be ignored.

    Raises:
        ValueError: naming the field, its value, the constraint and the remedy.
    """
    if config.model.checkpoint is None and config.model.hf_path is None:
        raise ValueError(
            "model.checkpoint and model.hf_path are both unset; name the frozen model by one."
        )
    r, d, p, t, o = config.router, config.data, config.parallel, config.train, config.optimizer
    at_least = {
        "data.max_length": (d.max_length, 2),
        "parallel.tensor_model_parallel_size": (p.tensor_model_parallel_size, 1),
        "parallel.pipeline_model_parallel_size": (p.pipeline_model_parallel_size, 1),
        "train.steps": (t.steps, 0),
        "train.global_batch_size": (t.global_batch_size, 1),
        "train.micro_batch_size": (t.micro_batch_size, 1),
        "train.seed": (t.seed, 0),
        "train.validation_interval": (t.validation_interval, 0),
        "optimizer.weight_decay": (o.weight_decay, 0),
        "optimizer.clip_grad": (o.clip_grad, 0),
        "train.max_skipped_steps": (t.max_skipped_steps, 0),
        "checkpoint.interval": (config.checkpoint.interval, 0),
        "checkpoint.keep": (config.checkpoint.keep, 0),
        "logging.interval": (config.logging.interval, 1),
    }
    for name, (value, least) in at_least.items():
        if not value >= least:
            raise ValueError(f"{name} = {value}: must be at least {least}.")
    if not 0 < r.threshold < 1:
        raise ValueError(
            f"router.threshold = {r.threshold}: must lie between 0 and 1, both excluded (0 keeps "
            "everything, 1 nothing)."
        )
    if not r.capacity_loss_weight > 0:
        raise ValueError(
            f"router.capacity_loss_weight = {r.capacity_loss_weight}: must be above 0, or nothing "
            "holds the capacity; to train without a budget set router.capacity to 1.0."
        )
    if not o.lr > 0:
        raise ValueError(f"optimizer.lr = {o.lr}: must be above 0.")
    for name in ("warmup_fraction", "average_fraction"):
        if not 0 <= getattr(o, name) <= 1:
            raise ValueError(f"optimizer.{name} = {getattr(o, name)}: must be 0 to 1.")
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        raise ValueError(
            "parallel.sequence_parallel = true: needs parallel.tensor_model_parallel_size above 1; "
            "leave it false, or raise the tensor degree."
        )
    if bool(d.validation) != bool(t.validation_interval):
        raise ValueError(
            f"data.validation = {d.validation!r} and train.validation_interval = "
            f"{t.validation_interval}: set both (a file and a number of steps) or neither."
        )


def check_batches(*, global_batch_size: int, micro_batch_size: int, data_ranks: int) -> None:
    """Refuse batch sizes the data-parallel ranks cannot share evenly.

    Raises:
        ValueError: naming both fields and the next batch size that fits.
    """
    share = micro_batch_size * data_ranks
    if global_batch_size % share:
        fits = -(-global_batch_size // share) * share
        raise ValueError(
            f"train.global_batch_size = {global_batch_size}: must be a multiple of "
            f"train.micro_batch_size ({micro_batch_size}) x data-parallel ranks ({data_ranks}); "
            f"use {fits}, for example."
        )
