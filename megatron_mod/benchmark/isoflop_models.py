"""The models of the benchmark at equal training FLOPs: trained once, and what is found of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from megatron_mod.benchmark.isoflop_text import TRAIN, VALIDATION, make_tokenizer, write_text
from megatron_mod.config import cli
from megatron_mod.config.model_size import EXPERTS, ModelSize
from megatron_mod.config.recipes import as_options
from megatron_mod.config.schema import Config
from megatron_mod.conversion.scratch import new_architecture
from megatron_mod.evaluation.work import Work
from megatron_mod.model.architecture import Architecture
from megatron_mod.model.cost import training_costs
from megatron_mod.parallel import topology
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.training.loop import train
from megatron_mod.training.plan import prepare

DENSE, MOD, RANDOM, STATIC = "dense", "mod", "random", "static"
MOE, STAGED, INTEGRATED = "moe", "mode_staged", "mode_integrated"
SELECTION = {MOD: "top_k", RANDOM: "random", STAGED: "top_k"}
CAUSAL = (MOD, STAGED)  # that have a causal rule
OF_EXPERTS = (MOE, STAGED, INTEGRATED)


class Variant(NamedTuple):
    """What becomes of every other block; ``capacity``: the share of the tokens it computes, or, of
    a mixture with no-op experts, of the pairs of tokens and experts, if all experts are chosen
    alike."""

    kind: str
    capacity: float

    def __str__(self) -> str:
        is_one_of_many = self.kind in SELECTION or self.kind == INTEGRATED
        return f"{self.kind}_{self.capacity:g}" if is_one_of_many else self.kind

    @property
    def is_routed(self) -> bool:
        return self.kind in SELECTION or self.kind == INTEGRATED


VARIANTS = (
    Variant(DENSE, 1.0),
    *(Variant(kind, capacity) for kind in (MOD, RANDOM) for capacity in (0.125, 0.5)),
    Variant(STATIC, 0.0),
    Variant(MOE, 1.0),
    *(Variant(STAGED, capacity) for capacity in (0.125, 0.5)),
    Variant(INTEGRATED, 0.5),
)


class Entry(NamedTuple):
    """One training."""

    variant: Variant
    size: ModelSize
    seed: int

    def __str__(self) -> str:
        return f"{self.variant} {self.size} seed {self.seed}"


@dataclass(frozen=True)
class Setup:
    """What all trainings have in common.

    Args:
        out: folder of the trainings and of what is found.
        text: what is trained and measured on; ``None``: Python's documentation.
        budget: floating-point operations of a training.
        most_steps: of a training, whatever its budget.
        length: tokens of a row.
        batch: rows a step.
        vocabulary: tokens of the tokenizer.
        lr: peak learning rate.
    """

    out: Path
    text: Path | None
    budget: float
    most_steps: int | None
    length: int
    batch: int
    vocabulary: int
    lr: float

    @cached_property
    def tokenizer(self) -> Path:
        """Its folder; the text's parts are made too."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(self.out, self.text)
        return make_tokenizer(self.out, vocabulary=self.vocabulary)

    def key(self, entry: Entry) -> str:
        """What tells a training from all others in ``out``."""
        name = str(entry).replace(" ", "_")
        shape = f"{self.length}x{self.batch}_{self.vocabulary}_{self.lr:g}"
        return f"{name}_{self.steps(entry)}_{shape}"

    def folder(self, entry: Entry) -> Path:
        return self.out / "runs" / self.key(entry)

    def run(self, entry: Entry) -> Path:
        """A training's folder, which is made unless it is complete."""
        folder = self.folder(entry)
        if not (folder / "summary.json").exists():
            config = self.config(entry, steps=self.steps(entry), save=folder)
            plan = prepare(config)
            with topology.joined(plan.topology, seed=config.train.seed):
                train(config, plan)
        return folder

    def steps(self, entry: Entry) -> int:
        """As many as the budget allows, to the nearest."""
        steps = max(1, round(self.budget / _counted(self, entry).step))
        return min(steps, self.most_steps or steps)

    def describe(self, entry: Entry) -> dict:
        """What is counted of a model; ``forward_flops`` of one row with logits at every token."""
        arch, routing, step = _counted(self, entry)
        is_routed = entry.variant.is_routed
        work = Work(arch, routing if is_routed else None)
        units = work.entries(self.length)
        kept = torch.arange(units) < int(entry.variant.capacity * units + 0.5)
        forward = work.prefill(self.length, dict.fromkeys(routing.places, kept))
        head = 2 * arch.hidden_size * arch.vocab_size * (self.length - 1)
        shapes = routing.added_shapes(arch.hidden_size, num_experts=arch.num_experts)
        added = sum(map(prod, shapes.values())) if is_routed else 0
        return {
            "kind": entry.variant.kind,
            "capacity": entry.variant.capacity,
            "size": str(entry.size),
            "seed": entry.seed,
            "steps": self.steps(entry),
            "parameters": arch.num_parameters + added * len(routing.layers),
            "train_flops": self.steps(entry) * step,
            "forward_flops": forward + head,
        }

    def config(self, entry: Entry, *, steps: int = 1, save: Path | None = None) -> Config:
        """Settings of a training of so many steps."""
        variant, size = entry.variant, entry.size
        layers = size.layers // 2 if variant.kind == STATIC else size.layers
        router: dict[str, object] = {"router.layers": "[]"}
        if selection := SELECTION.get(variant.kind):
            router = {
                "router.selection": selection,
                "router.granularity": "block_token",
                "router.layers": "{every: 2}",
                "router.capacity": variant.capacity,
            }
        elif variant.kind == INTEGRATED:
            router = {
                "router.granularity": "expert_token",
                "router.layers": "{every: 2}",
                "router.num_noop_experts": round(EXPERTS / variant.capacity) - EXPERTS,
            }
        fields = size.fields(layers=layers, experts=variant.kind in OF_EXPERTS)
        settings = {
            "model.config": json.dumps(fields),
            "model.dtype": "float32",
            **router,
            "data.train": self.out / TRAIN,
            "data.validation": self.out / VALIDATION,
            "data.format": "text",
            "data.tokenizer": self.tokenizer,
            "data.max_length": self.length,
            "data.cache": self.out / "cache",
            "data.packing": "false",
            "train.trainable": "all",
            "train.steps": steps,
            "train.global_batch_size": self.batch,
            "train.micro_batch_size": self.batch,
            "train.seed": entry.seed,
            "train.validation_interval": steps,
            "optimizer.lr": self.lr,
            "optimizer.weight_decay": 0.1,
            "checkpoint.save": save or self.out,
            "logging.level": "warning",
            "logging.tensorboard": "false",
        }
        return cli.parse(as_options(settings))


class _Counted(NamedTuple):
    """A model's shape, what routes it, and the operations of a step of its training."""

    arch: Architecture
    routing: RoutingConfig
    step: int


@cache
def _counted(setup: Setup, entry: Entry) -> _Counted:
    config = setup.config(entry)
    arch = new_architecture(config)
    routing = config.router.resolve(
        num_layers=arch.num_layers, hidden_size=arch.hidden_size, num_experts=arch.num_experts
    )
    costs = training_costs(
        arch,
        routing,
        [setup.length] * setup.batch,
        labels=setup.batch * (setup.length - 1),
        parts=config.train.parts,
    )
    return _Counted(arch, routing, sum(costs.layers) + costs.head)


def found_in(run: Path, kind: str) -> dict:
    """What a run measured at its end: nats a token by the true selection and by the causal rule,
    on what share of the tokens both agree, what share of the units is kept, and seconds a step, the
    median. Where nothing is selected both losses are one; a lot has no causal rule."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = list(map(json.loads, lines))
    last = [record for record in records if "validation_loss" in record][-1]
    loss = last["validation_loss"]
    by_rule = last.get("validation_loss_causal", loss)
    return {
        "loss_top_k": loss,
        "loss_causal": None if kind == RANDOM else by_rule,
        "agreement": last["causal_agreement"] if kind in CAUSAL else None,
        "kept": last["validation_capacity_mean"],
        "step_s": median(_step_seconds(records)),
    }


def _step_seconds(records: list[dict]) -> Iterator[float]:
    """Of each step but the first, which warms up, if there are more."""
    steps = [record for record in records if "tokens_per_second" in record]
    before = 0
    for number, record in enumerate(steps):
        tokens, before = record["tokens"] - before, record["tokens"]
        if number or len(steps) == 1:
            yield tokens / record["tokens_per_second"]
