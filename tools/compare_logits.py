"""Compare the logits of Megatron checkpoints with those of Hugging Face folders, in fp32.

    torchrun --standalone --nproc_per_node N tools/compare_logits.py --load DIR ... \\
        --hf-path DIR ...

Prints, for each pair, the largest logit difference over the largest logit.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mod.conversion.source import open_source
from megatron_mod.evaluation.parity import max_relative_difference, prompt_batch
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
    args = parser.parse_args()
    with one_message():
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
        figures = []
        for load, hf_path in zip(args.load, args.hf_path, strict=True):
            model, tokenizer = restore_model(open_source(load), ranks)
            rows = tokenizer([prompt_text(64), prompt_text(200)])["input_ids"]
            difference = max_relative_difference(model, hf_path, [prompt_batch(rows)])
            figures.append({"load": load, "hf_path": hf_path, "max_rel": difference})
            topology.print_once(
                f"{load} and {hf_path}: largest relative difference {difference:.2e}"
            )
        if args.json:
            topology.write_once(args.json, json.dumps(figures, indent=2) + "\n")
        topology.shutdown()


def prompt_text(words: int) -> str:
    """Some real English: the start of Python's language reference."""
    from megatron_mod.data.python_docs import topic_text

    return " ".join(topic_text().split()[:words])


if __name__ == "__main__":
    main()
