"""Time prefill and decode of an export beside its original, and what share of the ideal is reached.

    python tools/benchmark/inference.py --dense HF_DIR --routed EXPORT_DIR [--capacity 0.5]
    python tools/benchmark/inference.py --shapes llama3-8b --granularity attn_token --capacity 0.5

The two models take turns, who is first changes every turn, a first round is not counted, figures
are medians. Beside each speed-up stands the ideal one, of the work that the decisions of the timed
calls leave (floating-point operations of a prefill; bytes of weights, keys and values that a decode
step reads), the share of it that is reached, and the share of the saving, (1 - routed / dense) /
(1 - 1 / ideal), which is stricter. Prompts are pieces of Python's documentation, or random ids with
--shapes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron_mod.config.errors import one_message
from megatron_mod.conversion.hf_reader import read_config
from megatron_mod.evaluation.inference_speed import SHAPES, Pair, machine
from megatron_mod.parallel import device
from megatron_mod.routing.scheme import GRANULARITIES

PHASES = ("prefill", "decode")


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: naming the option, its value, the constraint and a remedy.
    """
    if bool(args.dense) != bool(args.routed):
        given, other = ("dense", "routed") if args.dense else ("routed", "dense")
        raise ValueError(
            f"--{given} {getattr(args, given)}: is timed beside another model; add --{other} DIR."
        )
    if bool(args.shapes) == bool(args.dense):
        raise ValueError(
            f"--shapes {args.shapes}, --dense {args.dense}: give either --dense HF_DIR --routed "
            "EXPORT_DIR or --shapes NAME."
        )
    if args.shapes:
        for name in ("granularity", "capacity"):
            if getattr(args, name) is None:
                raise ValueError(
                    f"--shapes {args.shapes}: its routers are random, so what they do must be "
                    f"said; add --{name}."
                )
        if args.keys_values and args.granularity not in ("attn_token", "block_token"):
            raise ValueError(
                f"--keys-values {args.keys_values}: has no meaning for --granularity "
                f"{args.granularity}; leave it out, or choose attn_token or block_token."
            )
    else:
        for name in ("granularity", "keys_values"):
            if value := getattr(args, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} {value}: an export has its own; leave it out, or "
                    "use --shapes."
                )
    if args.capacity is not None and not 0 <= args.capacity <= 1:
        raise ValueError(f"--capacity {args.capacity}: must be from 0 to 1.")
    for name in ("batches", "contexts", "repetitions", "new_tokens"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be 1 or more.")
    shape = SHAPES[args.shapes] if args.shapes else read_config(args.dense)
    room, longest = shape["max_position_embeddings"], max(args.contexts)
    if longest + args.new_tokens > room:
        raise ValueError(
            f"--contexts {longest}: with --new-tokens {args.new_tokens} it must fit into the "
            f"model's {room} positions; use at most {room - args.new_tokens}."
        )
    if args.json and not args.json.absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: its folder does not exist; make it first.")


def pair_of(args: argparse.Namespace) -> Pair:
    dtype = getattr(torch, args.dtype)
    if args.shapes:
        return Pair.of_shape(
            args.shapes, args.granularity, keys_values=args.keys_values, dtype=dtype
        )
    return Pair.of_folders(args.dense, args.routed, dtype=dtype)


def header() -> str:
    titles = ["batch", "context"]
    for phase in PHASES:
        titles += [f"{phase}: kept", "dense ms", "routed ms", "speed-up", "ideal", "share"]
        titles += ["of saving"]
    return f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}"


def line(row: dict) -> str:
    cells = [str(row["batch"]), str(row["context"])]
    for phase in PHASES:
        found = {"capacity": row["capacity"], **row[phase]}
        saving = found["saving_share"]
        cells += [
            f"{found['capacity']:.2f}",
            f"{1e3 * found['dense_s']:.1f}",
            f"{1e3 * found['routed_s']:.1f}",
            f"{found['speedup']:.2f}",
            f"{found['ideal']:.2f}",
            f"{100 * found['share']:.0f} %",
            "-" if saving is None else f"{100 * saving:.0f} %",
        ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dense", help="Hugging Face folder")
    parser.add_argument("--routed", help="an export of it")
    parser.add_argument("--shapes", choices=SHAPES, help="random weights in their place")
    parser.add_argument("--granularity", choices=GRANULARITIES, help="with --shapes")
    parser.add_argument("--keys-values", choices=("all", "selected"), help="with --shapes")
    parser.add_argument(
        "--capacity",
        type=float,
        help="share of the prompts' units to keep (default: as the export's thresholds have it)",
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="sequences")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048], help="tokens")
    parser.add_argument("--repetitions", type=int, default=5, help="prefills of each model")
    parser.add_argument("--new-tokens", type=int, default=24, help="decode steps of each model")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16" if device.HAS_GPU else "float32",
    )
    parser.add_argument("--json", type=Path, help="also write machine and rows to this file")
    args = parser.parse_args()
    with one_message():
        check(args)
        pair = pair_of(args)
        where, rows = machine(pair, args.dtype), []
        print(", ".join(f"{k} {v}" for k, v in where.items() if v is not None))
        print(header(), flush=True)
        for batch in args.batches:
            for context in args.contexts:
                row = pair.measure(
                    batch,
                    context,
                    repetitions=args.repetitions,
                    new_tokens=args.new_tokens,
                    capacity=args.capacity,
                )
                rows.append(row)
                print(line(row), flush=True)
    if args.json:
        report = {"machine": where, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
