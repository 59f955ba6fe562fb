"""Measure how fast data is prepared and dealt, and how much of it is padding."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_mod.config.errors import one_message
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.evaluation.data_speed import measure, needed_tokens_per_second
from megatron_mod.folders import writing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="JSON lines, as training takes them")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--global-batch-size", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way")
    parser.add_argument(
        "--parameters", type=float, default=8e9, help="of the model that is to be fed"
    )
    parser.add_argument(
        "--flops", type=float, default=989e12, help="operations a second of the device it runs on"
    )
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    with one_message():
        needed = needed_tokens_per_second(parameters=args.parameters, flops=args.flops)
        result = measure(
            args.data,
            load_tokenizer(args.tokenizer, vocab_size=2**31),  # any model's
            max_length=args.max_length,
            global_batch_size=args.global_batch_size,
            micro_batch_size=args.micro_batch_size,
            repeats=args.repeats,
        )
        result["needed_tokens_per_second"] = needed
        _print(result)
        if args.json:
            with writing(Path(args.json)):
                Path(args.json).write_text(json.dumps(result, indent=2), encoding="utf-8")


def _print(result: dict) -> None:
    wall, cpu = result["tokens_per_second"], result["tokens_per_cpu_second"]
    print(f"{result['samples']} samples, {result['tokens']} tokens")
    for name in wall:
        shares = [f"{of[name] / of['batch_encoding']:5.2f}" for of in (wall, cpu)]
        print(
            f"{name:18} {wall[name]:12,.0f} tokens/s, {cpu[name]:12,.0f} a core's second;"
            f" {shares[0]} and {shares[1]} of batch_encoding"
        )
    needed = result["needed_tokens_per_second"]
    for name, tokens in result["loader_tokens_per_second"].items():
        print(f"loader, {name:10} {tokens:12,.0f} tokens/s  {tokens / needed:5.1f} times the need")
    print("padding: " + ", ".join(f"{n} {100 * s:.1f} %" for n, s in result["padding"].items()))


if __name__ == "__main__":
    main()
