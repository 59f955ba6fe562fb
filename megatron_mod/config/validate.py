"""What is refused at start, before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mod.config.schema import Config, DataConfig

MOST_MINUTES = 525_600


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
        "parallel.context_parallel_size": (p.context_parallel_size, 1),
        "router.check_decisions_interval": (r.check_decisions_interval, 0),
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
    if not 0 < t.timeout < MOST_MINUTES:
        raise ValueError(
            f"train.timeout = {t.timeout}: minutes, above 0 and below {MOST_MINUTES} (a year)."
        )
    for name, value in (
        ("optimizer.warmup_fraction", o.warmup_fraction),
        ("optimizer.average_fraction", o.average_fraction),
        ("router.capacity_warmup_fraction", r.capacity_warmup_fraction),
    ):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} = {value}: must be 0 to 1.")
    if r.check_decisions_interval and p.tensor_model_parallel_size == 1:
        raise ValueError(
            f"router.check_decisions_interval = {r.check_decisions_interval}: compares "
            "tensor-parallel ranks and parallel.tensor_model_parallel_size is 1; leave it 0."
        )
    if d.packing and p.context_parallel_size > 1:
        raise ValueError(
            f"data.packing = true: ranks that share a row (parallel.context_parallel_size = "
            f"{p.context_parallel_size}) need rows of one document; set one of the two back."
        )
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        raise ValueError(
            "parallel.sequence_parallel = true: needs parallel.tensor_model_parallel_size above 1; "
            "leave it false, or raise the tensor degree."
        )
    _check_data(d, validation_interval=t.validation_interval)


def _check_data(d: DataConfig, *, validation_interval: int) -> None:
    for name, sources in (("train", d.train), ("validation", d.validation)):
        if sources is not None and not sources:
            raise ValueError(f"data.{name} = {sources!r}: names nothing; give a file.")
        if isinstance(sources, list) and len(set(sources)) < len(sources):
            raise ValueError(
                f"data.{name} = {sources}: names a file twice; give data.train weights, as "
                "{file: 2.0}, to take one more often."
            )
    for source, weight in d.train.items() if isinstance(d.train, dict) else ():
        if not 0 < weight < float("inf"):
            raise ValueError(f"data.train: the weight of {source} is {weight}; must be above 0.")
    if not 0 <= d.validation_split < 1:
        raise ValueError(f"data.validation_split = {d.validation_split}: must be 0 to below 1.")
    if d.validation and d.validation_split:
        raise ValueError(
            f"data.validation = {d.validation!r} and data.validation_split = "
            f"{d.validation_split}: set one of them."
        )
    if d.max_train_samples is not None and d.max_train_samples < 1:
        raise ValueError(f"data.max_train_samples = {d.max_train_samples}: must be at least 1.")
    if bool(d.validation or d.validation_split) != bool(validation_interval):
        raise ValueError(
            f"data.validation = {d.validation!r}, data.validation_split = {d.validation_split} and "
            f"train.validation_interval = {validation_interval}: set both (a file or a share, and "
            "a number of steps) or neither."
        )


def check_batches(
    *, global_batch_size: int, micro_batch_size: int, data_ranks: int, pipeline: int = 1
) -> None:
    """Refuse batch sizes the data-parallel ranks cannot share evenly.

    ``pipeline``: with a virtual pipeline its degree, which divides a rank's micro-batches.

    Raises:
        ValueError: naming both fields and the next batch size that fits.
    """
    share = micro_batch_size * data_ranks * pipeline
    if global_batch_size % share:
        fits = -(-global_batch_size // share) * share
        raise ValueError(
            f"train.global_batch_size = {global_batch_size}: must be a multiple of "
            f"train.micro_batch_size ({micro_batch_size}) x data-parallel ranks ({data_ranks})"
            f"{f' x pipeline ranks ({pipeline}), for the virtual pipeline' * (pipeline > 1)}; "
            f"use {fits}, for example."
        )
