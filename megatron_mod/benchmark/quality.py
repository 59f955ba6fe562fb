"""Every granularity and scope trained on one model, beside the best static removal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megatron_mod.config import cli
from megatron_mod.data.dataset import load_samples
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.evaluation import static
from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend
from megatron_mod.evaluation.perplexity import perplexity
from megatron_mod.evaluation.quickstart import load_model
from megatron_mod.evaluation.rows import Row
from megatron_mod.parallel import topology
from megatron_mod.routing.config import resolve_layers
from megatron_mod.training.loop import describe, prepare
from megatron_mod.training.loop import train as run_training

CAPACITY, MAX_LENGTH, DEEPEST = 0.75, 160, 15


@dataclass(frozen=True)
class Trainings:
    """What all trainings have in common.

    Args:
        load, hf_path: the model, as a base checkpoint and as a Hugging Face folder.
        data: folder of ``data.python_docs.write_splits``.
        out: folder of the trainings.
        steps, batch, lr: of each.
        settings: further ones, as on a training's command line.
    """

    load: Path
    hf_path: Path
    data: Path
    out: Path
    steps: int
    batch: int
    lr: float
    settings: Sequence[str]


class Static:
    """What removing layers for good costs, measured once per set of layers."""

    def __init__(self, args: Trainings) -> None:
        self.model = load_model(args.hf_path)
        vocab = self.model.config.vocab_size
        tokenizer = load_tokenizer(args.hf_path, vocab_size=vocab)
        self.backend = HuggingFaceBackend(self.model, tokenizer)
        self.samples = {
            name: load_samples(args.data / f"{name}.jsonl", tokenizer, max_length=MAX_LENGTH)
            for name in ("ranking", "validation")
        }
        self.layers = resolve_layers(
            {"deepest": DEEPEST}, num_layers=self.model.config.num_hidden_layers
        )
        self.store = args.out / "static.json"
        self.known = json.loads(self.store.read_text()) if self.store.exists() else {}

    def importance(self, target: str) -> dict[int, float]:
        """How much the loss grows without one layer's ``target``, nats a token."""
        found = self._once(
            f"importance {target}",
            lambda: static.rank_layers(
                self.model, self.samples["ranking"], self.layers, target=target
            ),
        )
        return {int(layer): cost for layer, cost in found.items()}

    def loss(self, target: str, capacity: float) -> tuple[float, list[int]]:
        """Validation loss without the least important layers, and which they are."""
        removed = static.removed_layers(self.importance(target), capacity=capacity)

        def measure() -> float:
            with static.without(self.model, removed, target=target):
                rows = [Row.labelled(sample) for sample in self.samples["validation"]]
                return math.log(perplexity(self.backend, rows).perplexity)

        return self._once(f"loss {target} {removed}", measure), removed

    def _once(self, key: str, measure) -> object:
        if key not in self.known:
            self.known[key] = measure()
            self.store.write_text(json.dumps(self.known, indent=1) + "\n")
        return self.known[key]


def train(args: Trainings, name: str, weight: float) -> dict:
    """One training; its validation record."""
    granularity, scope = name.rsplit("-", 1)
    run = args.out / name
    if not (run / "summary.json").exists():
        options = {
            "model.checkpoint": args.load,
            "model.dtype": "float32",
            "router.granularity": granularity,
            "router.layers.deepest": DEEPEST,
            "router.capacity": CAPACITY,
            "router.scope": scope,
            "router.capacity_loss_weight": weight,
            "data.train": args.data / "train.jsonl",
            "data.validation": args.data / "validation.jsonl",
            "data.max_length": MAX_LENGTH,
            "train.steps": args.steps,
            "train.global_batch_size": args.batch,
            "train.micro_batch_size": 4,
            "train.validation_interval": args.steps,
            "optimizer.lr": args.lr,
            "optimizer.warmup_fraction": 0.1,
            "optimizer.average_fraction": 0.5,
            "checkpoint.save": run,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        config = cli.parse([*arguments, *args.settings])
        plan = prepare(config)
        with topology.joined(plan.topology, seed=config.train.seed):
            describe(config, plan)
            run_training(config, plan)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return next(r for r in map(json.loads, reversed(lines)) if "validation_loss" in r)


def weight_of(granularity: str, importance: dict[int, float]) -> float:
    """A capacity loss weight that reaches the target without swinging far below it.

    About what the last layer that static removal takes is worth alone; sequences need more of it,
    because they give up whole layers and the second costs more than the first.
    """
    costs = sorted(importance.values())
    last = costs[round((1 - CAPACITY) * len(costs)) - 1]
    return last * (3 if granularity.endswith("sequence") else 1)


def compare(args: Trainings, *, granularities: Sequence[str], scopes: Sequence[str]) -> None:
    """Print a table and write ``quality.json``; a training whose folder is complete is not
    repeated."""
    args.out.mkdir(parents=True, exist_ok=True)
    baseline = Static(args)
    dense, _ = baseline.loss("attn", 1.0)
    print(f"dense perplexity {math.exp(dense):.2f}, target capacity {CAPACITY}\n")
    rows = []
    for scope in scopes:
        for granularity in granularities:
            target = granularity.split("_")[0]
            weight = max(weight_of(granularity, baseline.importance(target)), 0.01)
            record = train(args, f"{granularity}-{scope}", weight)
            kept = record["validation_capacity"]
            capacity = fmean(kept)
            fixed, removed = baseline.loss(target, capacity)
            rows.append(
                {
                    "granularity": granularity,
                    "scope": scope,
                    "weight": weight,
                    "capacity": capacity,
                    "capacity_per_layer": kept,
                    "perplexity": math.exp(record["validation_loss"]),
                    "static_perplexity": math.exp(fixed),
                    "static_removed": removed,
                }
            )
            (args.out / "quality.json").write_text(json.dumps(rows, indent=1) + "\n")
            print(
                f"| {granularity} | {scope} | {weight:.3f} | {capacity:.3f} |"
                f" {rows[-1]['perplexity']:.2f} | {rows[-1]['static_perplexity']:.2f}"
                f" ({len(removed)}) |",
                flush=True,
            )
