"""A training as its settings would have it, without starting it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_mod.config import cli
from megatron_mod.config.machines import Machines, check_machines
from megatron_mod.config.model_folder import ADAPTER, ModelFolder
from megatron_mod.config.ranks import SETTINGS
from megatron_mod.config.rules import InputFile
from megatron_mod.config.schema import Config
from megatron_mod.conversion.scratch import tokenizer_place
from megatron_mod.conversion.source import holds_model
from megatron_mod.data.sources import files_of
from megatron_mod.estimate import here
from megatron_mod.estimate.advice import advise
from megatron_mod.estimate.estimate import estimate
from megatron_mod.estimate.page import advice, page
from megatron_mod.estimate.resolve import hf_config_of, kind_of, shape_of
from megatron_mod.model.architecture import Architecture
from megatron_mod.monitoring.weights_and_biases import check_installed
from megatron_mod.parallel import device
from megatron_mod.training.resume import check_settings

KNOWN = "h100"  # where no kind of GPU is named, and none is here


class Found(NamedTuple):
    """A file or folder that a setting names, and what is wrong with it, if anything."""

    setting: str
    place: str
    problem: str | None = None
    note: str = ""

    def __str__(self) -> str:
        state = self.note or ("missing" if self.problem else "found")
        return f"  {state:<8} {self.setting:<17} {self.place}"


def show(config: Config, machines: Machines) -> None:
    """Print the configuration, the files it names, the ranks it needs and an estimate.

    Ranks are those that ``torchrun`` started, or of the machines named, or as few as there can be.

    Raises:
        ValueError: what the training itself would be refused for, files that are missing first.
    """
    files = list(_files(config))
    print(f"configuration\n{_indented(cli.to_yaml(config))}\n")
    print("files (their content is not read)", *files, sep="\n", end="\n\n")
    missing = [each for each in files if each.problem]
    world_size, per_node = _ranks(config, machines)
    print(f"{_needed(config, world_size)}\n")
    model_is_here = not any(each.setting.startswith("model.") for each in missing)
    hf_config = hf_config_of(config, machines.hf_config)
    if model_is_here or hf_config is not None:
        arch = shape_of(config, hf_config)
        _print_estimate(config, arch, machines, world_size=world_size, per_node=per_node)
    else:
        print("estimate: none without the model; --hf-config takes its config.json, or its name")
    if missing:
        raise ValueError("; ".join(f"{f.setting} = {f.place}: {f.problem}" for f in missing) + ".")
    check_settings(config)
    check_installed(config.logging)


def _files(config: Config) -> Iterator[Found]:
    model, data = config.model, config.data
    for name in ("checkpoint", "hf_path", "routers"):
        if place := getattr(model, name):
            if holds_model(config):
                yield Found(f"model.{name}", place, note="unused")  # its steps have it all
            else:
                yield Found(f"model.{name}", place, _model_problem(name, place))
    if isinstance(model.config, str):
        is_there = holds_model(config) or Path(model.config).exists()
        problem = None if is_there else "no such file or folder"
        yield Found("model.config", model.config, problem)
    if model.lora:
        is_run, adapter = ModelFolder().problem(model.lora) is None, Path(model.lora, ADAPTER)
        problem = None if is_run or adapter.is_file() else "no adapters (PEFT's, or a run's) there"
        yield Found("model.lora", model.lora, problem)
    for name in ("train", "validation"):
        sources = getattr(data, name)
        for source in [sources] if isinstance(sources, str) else sources or ():
            yield _source(f"data.{name}", source)
    if data.tokenizer:
        is_folder = Path(data.tokenizer).is_dir()
        problem = None if is_folder else InputFile().problem(data.tokenizer)
        yield Found("data.tokenizer", data.tokenizer, problem)
    elif model.config is not None and not holds_model(config):
        yield Found("data.tokenizer", str(tokenizer_place(config)))
    save = config.checkpoint.save
    yield Found("checkpoint.save", save, note="found" if Path(save).exists() else "new")


def _model_problem(name: str, place: str) -> str | None:
    if name == "hf_path":
        return (
            None if Path(place, "config.json").is_file() else "has no config.json, or is not here"
        )
    return ModelFolder().problem(place)


def _source(setting: str, source: str) -> Found:
    try:
        files = files_of(source)
    except ValueError as error:
        return Found(setting, source, str(error).partition(": ")[2].rstrip("."))
    return Found(setting, source, note="" if files else "named")


def _ranks(config: Config, machines: Machines) -> tuple[int, int]:
    """How many ranks there are to be, and on one machine."""
    if "WORLD_SIZE" in os.environ:
        world_size = int(os.environ["WORLD_SIZE"])
        return world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    least = _least(config)
    per_node = machines.gpus_per_node or (8 if machines.nodes > 1 or least % 8 == 0 else least)
    if machines.nodes == 1 and machines.gpus_per_node is None:
        return least, per_node
    check_machines(config.parallel, nodes=machines.nodes, per_node=per_node)
    return machines.nodes * per_node, per_node


def _least(config: Config) -> int:
    p = config.parallel
    sharing = math.lcm(p.context_parallel_size, p.expert_model_parallel_size)
    return p.tensor_model_parallel_size * p.pipeline_model_parallel_size * sharing


def _needed(config: Config, world_size: int) -> str:
    p, t = config.parallel, config.train
    factors = " x ".join(f"{SETTINGS[name]} ({value})" for name, value in p.degrees.items())
    if (expert := p.expert_model_parallel_size) > 1:
        factors += f", for {SETTINGS['expert']} ({expert})"
    most = t.global_batch_size // t.micro_batch_size
    return (
        f"world size: a multiple of {_least(config)} = {factors}, what is left over data parallel, "
        f"at most {most} ways (train.global_batch_size / train.micro_batch_size); "
        f"{world_size} from here on"
    )


def _print_estimate(
    config: Config, arch: Architecture, machines: Machines, *, world_size: int, per_node: int
) -> None:
    is_here = machines.gpu is None and device.HAS_GPU
    kind = kind_of(machines.gpu or KNOWN, per_node=per_node)
    found = estimate(
        config,
        arch,
        nodes=world_size // per_node,
        per_node=per_node,
        kind_of=here.gpu if is_here else kind,
    )
    if machines.gpu is None and not is_here:
        print(f"there is no GPU here; for an {KNOWN} (--gpu names another kind):\n")
    print(page(found))
    if not found.fits:
        print(f"\n{advice(advise(found))}")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
