"""What is refused at start, before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_mod.config import rules
from megatron_mod.config.experts import check_experts
from megatron_mod.config.noops import check_noops
from megatron_mod.config.selection import check_selection, check_whole_model

if TYPE_CHECKING:
    from megatron_mod.config.router_section import RouterConfig
    from megatron_mod.config.schema import Config, DataConfig, TrainConfig


def check_values(config: Config, *, place: Callable[[str], str] = lambda name: "") -> None:
    """Refuse values out of range and settings that would be ignored.

    ``place``: where a field was set, as a message goes on with it.

    Raises:
        ValueError: naming the field, its value, the constraint and the remedy.
    """
    _check_rules(config, place, only=rules.Range)
    model = config.model
    if model.checkpoint is None and model.hf_path is None and model.config is None:
        raise ValueError(
            "model.checkpoint and model.hf_path are both unset; name the frozen model by one, or "
            "set model.config to train a model from scratch."
        )
    r, d, p, t = config.router, config.data, config.parallel, config.train
    _check_length(t, place)
    check_selection(r, place)
    check_noops(config, place)
    check_experts(r, place)
    check_whole_model(config, place)
    _check_work(r, place)
    if r.check_decisions_interval and p.tensor_model_parallel_size == 1:
        raise ValueError(
            f"router.check_decisions_interval = {r.check_decisions_interval}: compares "
            "tensor-parallel ranks and parallel.tensor_model_parallel_size is 1; leave it 0."
        )
    _check_lora(config, place)
    if r.layers == []:
        _check_no_routers(config, place)
    by_threshold = r.selection == "threshold" and r.num_noop_experts is None
    if not r.bias and r.capacity_loss_weight == "auto" and by_threshold and r.layers != []:
        raise ValueError(
            "router.bias = false: router.capacity_loss_weight = auto needs biases, without which "
            "only a penalty holds the capacity; give a number (1.0 as published), or set "
            "router.bias to true."
        )
    if not r.bias and r.init == "importance":
        raise ValueError(
            "router.init = importance: sets the routers' biases and router.bias is false; set "
            "router.init to zeros, or router.bias to true."
        )
    if r.stand_in == "none" and r.stand_in_rank is not None:
        raise ValueError(
            f"router.stand_in_rank = {r.stand_in_rank}: nothing stands in for what is skipped; "
            "set router.stand_in to linear, or leave the rank out."
        )
    if r.stand_in == "none" and r.stand_in_tokens is not None:
        raise ValueError(
            f"router.stand_in_tokens = {r.stand_in_tokens}: nothing stands in for what is skipped; "
            "set router.stand_in to linear, or leave the tokens out."
        )
    if r.stand_in == "none" and "stand_ins" in t.trainable:
        raise ValueError(
            f"train.trainable = {t.trainable}: there are no stand-ins to train; set "
            "router.stand_in to linear, or train.trainable to routers."
        )
    if r.stand_in_lr is not None and "stand_ins" not in t.trainable:
        raise ValueError(
            f"router.stand_in_lr = {r.stand_in_lr}: would be ignored, because train.trainable = "
            f"{t.trainable} gives stand-ins no rate of their own; set that to routers+stand_ins or "
            "routers+stand_ins+lora, or leave the rate out."
        )
    if t.prefix_cache is not None and t.frozen_prefix == "recompute":
        raise ValueError(
            f"train.prefix_cache = {t.prefix_cache}: would be ignored, because train.frozen_prefix "
            "is recompute; set that to cache, or leave the folder out."
        )
    if d.packing is True and p.context_parallel_size > 1:
        raise ValueError(
            f"data.packing = true: ranks that share a row (parallel.context_parallel_size = "
            f"{p.context_parallel_size}) need rows of one document; set one of the two back."
        )
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        raise ValueError(
            "parallel.sequence_parallel = true: needs parallel.tensor_model_parallel_size above 1; "
            "leave it false, or raise the tensor degree."
        )
    first = p.num_layers_in_first_pipeline_stage
    if first is not None and p.pipeline_layout != "auto":
        raise ValueError(
            f"parallel.pipeline_layout = {p.pipeline_layout} and "
            f"parallel.num_layers_in_first_pipeline_stage = {first}: both cut the pipeline; leave "
            "the second out."
        )
    if (fp8 := config.model.fp8) is not None:
        _check_fp8(fp8, config)
    for name in ("wandb_project", "wandb_name"):
        value = getattr(config.logging, name)
        if value is not None and config.logging.wandb is False:
            raise ValueError(
                f"logging.{name} = {value}: would be ignored, because logging.wandb is false; set "
                "that to true, or leave the name out."
            )
    _check_data(d, validation_interval=t.validation_interval)


def _check_fp8(fp8: str, config: Config) -> None:
    """What products in FP8 cannot go with, whatever the model and the device."""
    m, t = config.model, config.train
    conflicts = (
        (m.dtype == "float32", "model.dtype = float32", "asks for more bits", "bfloat16"),
        (
            m.transformer_impl == "local",
            "model.transformer_impl = local",
            "only Transformer Engine multiplies in FP8",
            "transformer_engine",
        ),
        (
            t.recompute != "none",
            f"train.recompute = {t.recompute}",
            "what is computed again would not be in FP8",
            "none",
        ),
        (
            t.trainable == "all",
            "train.trainable = all",
            "products by weights that train are not in FP8 here",
            "routers",
        ),
    )
    for conflict, other, why, remedy in conflicts:
        if conflict:
            name = other.partition(" ")[0]
            raise ValueError(
                f"model.fp8 = {fp8} and {other}: {why}; set {name} to {remedy}, or leave model.fp8 "
                "out."
            )


def _check_lora(config: Config, place: Callable[[str], str]) -> None:
    lora, trainable, given = config.lora, config.train.trainable, config.model.lora
    trains = "lora" in config.train.parts
    for name in ("dropout", "lr"):
        value = getattr(lora, name)
        if given and value is not None and not trains:
            raise ValueError(
                f"lora.{name} = {value}{place(f'lora.{name}')}: would be ignored, because the "
                f"adapters of model.lora stay as they are (train.trainable = {trainable}); leave "
                f"it out, or train them ({trainable}+lora)."
            )
    if given:
        return
    if lora.rank is not None and not trains:
        raise ValueError(
            f"lora.rank = {lora.rank}{place('lora.rank')}: would be ignored, because "
            f"train.trainable = {trainable} trains no adapters; set that to {trainable}+lora, or "
            "leave the rank out."
        )
    if lora.rank is None and trains:
        raise ValueError(
            f"train.trainable = {trainable}{place('train.trainable')}: there are no adapters to "
            "train; set lora.rank (16, for example), name some (model.lora), or set "
            "train.trainable to routers."
        )
    for name, value in vars(lora).items():
        if value is not None and lora.rank is None:
            raise ValueError(
                f"lora.{name} = {value}{place(f'lora.{name}')}: would be ignored, because "
                "lora.rank is unset and there are no adapters; set that, or leave it out."
            )


def _check_no_routers(config: Config, place: Callable[[str], str]) -> None:
    trainable = config.train.trainable
    if trainable not in ("lora", "all"):
        raise ValueError(
            f"router.layers = []{place('router.layers')}: train.trainable = {trainable} trains "
            "routers; name at least one layer, or use 'deepest: n' or 'all', or train adapters "
            "alone (train.trainable: lora), or the whole model (all)."
        )
    if config.model.routers is not None:
        raise ValueError(
            f"model.routers = {config.model.routers}{place('model.routers')}: would be ignored, "
            "because router.layers = [] has none; leave one of the two out."
        )
    unset = type(config.router)(layers=[])
    for field in dataclasses.fields(config.router):
        value = getattr(config.router, field.name)
        if field.name != "layers" and value != getattr(unset, field.name):
            name = f"router.{field.name}"
            raise ValueError(
                f"{name} = {value}{place(name)}: would be ignored, because router.layers = [] has "
                "no routers; leave it out, or name layers."
            )
    if config.train.loss == "distill":
        raise ValueError(
            f"train.loss = distill{place('train.loss')}: without routers (router.layers = []) the "
            "dense model is the one that adapters start from, and there is nothing to learn from "
            "it; set train.loss to task or both."
        )


def _check_work(r: RouterConfig, place: Callable[[str], str]) -> None:
    if r.work is None:
        return
    work = f"router.work = {r.work}{place('router.work')}"
    if isinstance(r.work, list) and not (len(r.work) == 2 and r.work[0] < r.work[1]):
        raise ValueError(
            f"{work}: a list must hold two budgets, the least and the most; give these, or one "
            "number."
        )
    if r.capacity is not None:
        raise ValueError(
            f"router.capacity = {r.capacity}{place('router.capacity')} and {work}: both say what "
            "may be kept; leave one of them out, or set it to null."
        )
    if r.scope == "layer":
        raise ValueError(
            f"router.scope = layer{place('router.scope')}: has no meaning for {work}, which is of "
            "the whole model; set it to model, or give router.capacity in place of router.work."
        )
    if not r.bias:
        raise ValueError(
            f"router.bias = false{place('router.bias')}: nothing but biases holds {work}; set it "
            "to true, or give router.capacity in place of router.work."
        )
    if r.capacity_loss_weight != "auto":
        raise ValueError(
            f"router.capacity_loss_weight = {r.capacity_loss_weight:g}"
            f"{place('router.capacity_loss_weight')}: is a penalty on capacity, and {work} is held "
            "by a price per operation; set it to auto, or give router.capacity in place of "
            "router.work."
        )


def _check_length(t: TrainConfig, place: Callable[[str], str]) -> None:
    if t.steps is None and t.epochs is None:
        raise ValueError("train.steps and train.epochs are both unset; set one of them.")
    if t.steps is not None and t.epochs is not None:
        raise ValueError(
            f"train.steps = {t.steps}{place('train.steps')} and train.epochs = {t.epochs:g}"
            f"{place('train.epochs')}: both say how long to train; leave one of them out, or set "
            "it to null."
        )


def check_outputs(config: Config) -> None:
    """Refuse folders that cannot be written to.

    Raises:
        ValueError: naming the field, the folder and what is in the way.
    """
    _check_rules(config, lambda name: "", only=rules.OutputFolder)


def _check_rules(config: Config, place: Callable[[str], str], *, only: type) -> None:
    for section in vars(config):

        def name(field: str, value: object, section: str = section) -> str:
            return f"{section}.{field} = {value}{place(f'{section}.{field}')}"

        rules.check(getattr(config, section), name=name, only=only)


def _check_data(d: DataConfig, *, validation_interval: int) -> None:
    if d.format == "text" and d.template != "auto":
        raise ValueError(
            f"data.template = {d.template}: would be ignored, because data.format = text has no "
            "conversations; leave it out, or set data.format to auto."
        )
    for name, sources in (("train", d.train), ("validation", d.validation)):
        if sources is not None and not sources:
            raise ValueError(f"data.{name} = {sources!r}: names nothing; give a file.")
        if isinstance(sources, list) and len(set(sources)) < len(sources):
            raise ValueError(
                f"data.{name} = {sources}: names a file twice; give data.train weights, as "
                "{file: 2.0}, to take one more often."
            )
    for source, weight in d.train.items() if isinstance(d.train, dict) else ():
        if problem := rules.Range(above=0).problem(weight):
            raise ValueError(f"data.train: the weight of {source} is {weight}; {problem}.")
    if d.validation and d.validation_split:
        raise ValueError(
            f"data.validation = {d.validation!r} and data.validation_split = "
            f"{d.validation_split}: set one of them."
        )
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
