"""Every granularity and scope trained on one model, beside the best static removal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch

from megatron_mod.config import cli
from megatron_mod.conversion.convert import megatron_to_hf
from megatron_mod.conversion.routers import write_step
from megatron_mod.conversion.source import Base, open_base
from megatron_mod.data.dataset import load_samples
from megatron_mod.evaluation.huggingface import load_huggingface
from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend
from megatron_mod.evaluation.rows import Row
from megatron_mod.evaluation.static import Greedy, loss_without
from megatron_mod.parallel import topology
from megatron_mod.routing.config import RoutingConfig, resolve_layers
from megatron_mod.routing.scheme import Scheme
from megatron_mod.training.loop import train as run_training
from megatron_mod.training.plan import prepare

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
        self.args, self.base = args, open_base(args.hf_path)
        self.layers = resolve_layers({"deepest": DEEPEST}, num_layers=self.base.arch.num_layers)
        self.store = args.out / "static.json"
        self.known = json.loads(self.store.read_text()) if self.store.exists() else {}
        self._choices: dict[str, Greedy] = {}
        self._rows: dict[str, list[Row]] = {}

    def importance(self, target: str) -> dict[int, float]:
        """How much the loss grows without one layer's ``target``, nats a token."""

        def measure() -> dict[int, float]:
            choice = self._choice(target)
            choice.first(1)
            kept = loss_without(choice.backend, choice.rows, ())
            return {layer: loss - kept for layer, loss in choice.losses[0].items()}

        found = self._once(f"importance {target}", measure)
        return {int(layer): cost for layer, cost in found.items()}

    def loss(self, target: str, capacity: float) -> tuple[float, list[int]]:
        """Validation loss at this capacity without the layers that cost least, and which they
        are."""
        count = round((1.0 - capacity) * len(self.layers))
        removed = self._once(
            f"removed {target} {count}", lambda: sorted(self._choice(target).first(count))
        )

        def measure() -> float:
            backend = self._choice(target).backend
            return loss_without(backend, self._rows["validation"], removed)

        return self._once(f"loss {target} {removed}", measure), removed

    def _choice(self, target: str) -> Greedy:
        """On the model with routers whose thresholds alone say what is kept."""
        if target not in self._choices:
            export = self.args.out / f"static_{target}"
            if not export.exists():
                save_untrained(self.base, target, self.layers, export)
            backend = HuggingFaceBackend(*load_huggingface(export))
            for name in ("ranking", "validation"):
                path = self.args.data / f"{name}.jsonl"
                samples = load_samples(path, backend.tokenizer, max_length=MAX_LENGTH)
                self._rows[name] = list(map(Row.labelled, samples))
            self._choices[target] = Greedy(backend, self._rows["ranking"])
        return self._choices[target]

    def _once(self, key: str, measure) -> object:
        if key not in self.known:
            self.known[key] = measure()
            self.store.write_text(json.dumps(self.known, indent=1) + "\n")
        return self.known[key]


def save_untrained(base: Base, target: str, layers: Sequence[int], save: Path) -> None:
    """Write an export whose routers are zeros."""
    routing = RoutingConfig(f"{target}_token", tuple(layers), (1.0,) * len(layers))
    weights = {layer: torch.zeros(1, base.arch.hidden_size) for layer in layers}
    where = {"base": str(base.path.resolve()), "fingerprint": base.fingerprint()}
    with topology.single_process(), TemporaryDirectory() as folder:
        write_step(Path(folder) / "routers", routing, weights, **where)
        megatron_to_hf(Path(folder) / "routers", save)


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
    return last * (3 if Scheme.parse(granularity).per_sequence else 1)


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
            target = Scheme.parse(granularity).target
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
