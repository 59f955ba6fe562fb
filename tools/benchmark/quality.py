"""Train every granularity and scope on one model and put each beside the best static removal.

    python tools/benchmark/quality.py --load BASE --hf-path DIR --data DIR --out DIR

Prints a table and writes OUT/quality.json. A training whose folder is complete is not repeated.
Options that this script does not know (``--section.field value``) go to every training.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_mod.data.dataset import load_samples
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.evaluation import static
from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend
from megatron_mod.evaluation.perplexity import perplexity
from megatron_mod.evaluation.quickstart import load_model
from megatron_mod.evaluation.rows import Row
from megatron_mod.routing.config import resolve_layers
from megatron_mod.routing.scheme import GRANULARITIES, Scheme

CAPACITY, MAX_LENGTH, DEEPEST = 0.75, 160, 15


class Static:
    """What removing layers for good costs, measured once per set of layers."""

    def __init__(self, args: argparse.Namespace) -> None:
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


def train(args: argparse.Namespace, overrides: list[str], name: str, weight: float) -> dict:
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
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, str(root / "launch" / "pretrain_router.py")]
        for option, value in options.items():
            command += [f"--{option}", str(value)]
        subprocess.run([*command, *overrides], check=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=Path, required=True, help="base checkpoint")
    parser.add_argument("--hf-path", type=Path, required=True, help="the same model, Hugging Face")
    parser.add_argument("--data", type=Path, required=True, help="what make_python_docs.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--granularities", nargs="+", default=GRANULARITIES)
    parser.add_argument("--scopes", nargs="+", default=["model", "layer"])
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3)
    args, overrides = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    baseline = Static(args)
    dense, _ = baseline.loss("attn", 1.0)
    print(f"dense perplexity {math.exp(dense):.2f}, target capacity {CAPACITY}\n")
    rows = []
    for scope in args.scopes:
        for granularity in args.granularities:
            target = Scheme.parse(granularity).target
            weight = max(weight_of(granularity, baseline.importance(target)), 0.01)
            record = train(args, overrides, f"{granularity}-{scope}", weight)
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


if __name__ == "__main__":
    main()
