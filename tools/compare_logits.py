"""Compare the logits of Megatron checkpoints with those of Hugging Face folders, in fp32.

    torchrun --standalone --nproc_per_node N tools/compare_logits.py --load DIR ... \\
        --hf-path DIR ...

Prints, for each pair, the largest logit difference over the largest logit, and exits with status 1
if one is larger than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist

from megatron_mod.conversion.source import open_source
from megatron_mod.evaluation.parity import (
    default_tolerance,
    max_relative_difference,
    prompt_batch,
)
from megatron_mod.parallel import topology
from megatron_mod.process import one_message
from megatron_mod.training.restore import restore_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", nargs="+", required=True, help="base checkpoints or runs")
    parser.add_argument("--hf-path", nargs="+", required=True, help="as many Hugging Face folders")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel ranks")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest relative difference that passes (default: 1e-4, or eight steps of the "
        "coarser dtype where the two folders' weights differ in it)",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that a Hugging Face folder brings (an export's needs no trust)",
    )
    args = parser.parse_args()
    with one_message():
        if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
            raise ValueError(f"--tolerance {args.tolerance:g}: must be a number from 0 up.")
        if len(args.load) != len(args.hf_path):
            raise ValueError(
                f"--load names {len(args.load)} folders and --hf-path {len(args.hf_path)}; "
                "give as many of each."
            )
        ranks = topology.plan(
            tensor=args.tensor,
            pipeline=args.pipeline,
            world_size=topology.environment_world_size(),
        )
        topology.initialize(ranks)
        figures, faults = [], []
        for load, hf_path in zip(args.load, args.hf_path, strict=True):
            source = open_source(load)
            tolerance = args.tolerance
            if tolerance is None:
                tolerance = default_tolerance(source.base, hf_path)
            model, tokenizer = restore_model(source, ranks)
            rows = tokenizer([prompt_text(64), prompt_text(200)])["input_ids"]
            difference = max_relative_difference(
                model,
                hf_path,
                [prompt_batch(rows)],
                trust_remote_code=args.trust_remote_code,
            )
            figures.append({"load": load, "hf_path": hf_path, "max_rel": difference})
            topology.print_once(
                f"{load} and {hf_path}: largest relative difference {difference:.2e}"
            )
            if difference > tolerance:
                faults.append(
                    f"error: {load} and {hf_path} differ by {difference:.2e}, more than the "
                    f"{tolerance:.2e} of rounding (--tolerance): they are not the same model."
                )
        if args.json:
            topology.write_once(args.json, json.dumps(figures, indent=2) + "\n")
        if faults and dist.get_rank() == 0:
            print(*faults, sep="\n", file=sys.stderr, flush=True)
        topology.shutdown()
        if faults:
            sys.exit(1)


def prompt_text(words: int) -> str:
    """Some real English: the start of Python's language reference."""
    from megatron_mod.data.python_docs import topic_text

    return " ".join(topic_text().split()[:words])


if __name__ == "__main__":
    main()
