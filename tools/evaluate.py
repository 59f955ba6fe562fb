"""Perplexity and lm-eval tasks of a Hugging Face folder or of a Megatron checkpoint.

    python tools/evaluate.py --load EXPORT_DIR --perplexity FILE
    torchrun --nproc_per_node N tools/evaluate.py --load DIR --tensor T --pipeline P \\
        --tasks NAME ... --include_path DIR --json FILE

The ranks that tensor x pipeline leave over share the texts. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Before the libraries read them: no request to a network that may not answer, one progress bar.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
if int(os.environ.get("RANK", 0)):
    os.environ["TQDM_DISABLE"] = "1"

from megatron_mod.config.errors import one_message

if TYPE_CHECKING:
    from megatron_mod.evaluation.backend import Backend


def main() -> None:
    args = parse()
    with one_message():
        names = [name for entry in args.tasks or () for name in entry.split(",") if name]
        check(args, names)
        # The heavy imports come after the command line has been understood.
        manager = None
        if names:
            from megatron_mod.evaluation.tasks import evaluate_tasks, find_tasks

            manager = find_tasks(names, include_path=args.include_path)
        from megatron_mod.evaluation.report import build_report, table
        from megatron_mod.parallel import topology

        ranks = topology.plan(
            tensor=args.tensor,
            pipeline=args.pipeline,
            world_size=topology.environment_world_size(),
        )
        topology.initialize(ranks)
        backend = load(args, ranks)
        quality = tasks = None
        if args.perplexity:
            from megatron_mod.evaluation.perplexity import perplexity_of_rows, read_rows

            length = min(args.max_length or TEXT_LENGTH, backend.max_length)
            rows = read_rows(args.perplexity, backend.tokenizer, max_length=length)
            quality = perplexity_of_rows(backend, rows)
        if names:
            tasks = evaluate_tasks(
                backend,
                manager,
                names,
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                apply_chat_template=args.apply_chat_template,
                is_first_rank=int(os.environ.get("RANK", 0)) == 0,
            )
        settings = {
            "model": args.load,
            "dtype": args.dtype,
            "parallel": ranks.to_dict(),
            "perplexity_file": args.perplexity,
        }
        report = build_report(backend, settings, quality, tasks)
        topology.print_once("\n" + table(report, tasks))
        if args.json:
            topology.write_once(args.json, json.dumps(report, indent=2, default=str) + "\n")
        topology.shutdown()


TEXT_LENGTH = 2048  # tokens a text is cut to where nobody says


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--load",
        "--hf-path",
        required=True,
        help="a Hugging Face folder (export or dense), a base checkpoint, or a training run",
    )
    add("--perplexity", metavar="FILE", help="conversations (.jsonl), of which the answers are "
        "scored, or a text")  # fmt: skip
    add("--tasks", nargs="+", metavar="NAME", help="lm-eval tasks")
    add("--include_path", "--include-path", metavar="DIR", help="folder with task files")
    add("--num_fewshot", "--num-fewshot", type=int, help="examples before each question")
    add("--limit", type=int, help="first so many documents of each task")
    add("--apply_chat_template", "--apply-chat-template", action="store_true",
        help="tasks in the model's chat format")  # fmt: skip
    add("--pooling", choices=("prompt", "all"), help="sequence granularities: what a decision sees "
        "of a scored text: its context (default), as in generation, or all of it")  # fmt: skip
    add("--batch_size", "--batch-size", type=int, default=1, help="texts run together (1)")
    add("--max-length", type=int, help=f"most tokens of a text; default: the model's positions, "
        f"with --perplexity at most {TEXT_LENGTH}")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--tensor", type=int, default=1, help="tensor-parallel ranks (Megatron checkpoints)")
    add("--pipeline", type=int, default=1, help="pipeline-parallel ranks (Megatron checkpoints)")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    return parser.parse_args()


def check(args: argparse.Namespace, names: list[str]) -> None:
    """Refuse what would be ignored, before anything heavy is loaded."""
    if not names and not args.perplexity:
        raise ValueError("nothing to evaluate: give --perplexity FILE or --tasks NAME, or both.")
    for option in ("include_path", "num_fewshot", "limit", "apply_chat_template"):
        value = getattr(args, option)
        if value not in (None, False) and not names:
            raise ValueError(f"--{option} belongs to --tasks; leave it out, or name a task.")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: must be at least 1.")
    if not is_megatron(args.load):
        if not Path(args.load, "config.json").is_file():
            raise ValueError(
                f"--load {args.load}: neither a Hugging Face folder (config.json) nor a checkpoint "
                "that tools/convert_hf_to_megatron.py or launch/pretrain_router.py wrote."
            )
        if args.tensor * args.pipeline > 1:
            raise ValueError(
                f"--tensor {args.tensor} --pipeline {args.pipeline}: a Hugging Face folder is run "
                "whole on every rank; leave them out, or load the Megatron checkpoint."
            )


def is_megatron(folder: str) -> bool:
    return any(Path(folder, name).is_file() for name in ("megatron_mod.json", "latest"))


def load(args: argparse.Namespace, ranks) -> Backend:
    import torch

    dtype = getattr(torch, args.dtype)
    settings = {
        "max_length": args.max_length,
        "batch_size": args.batch_size,
        "pooling": args.pooling,
    }
    if is_megatron(args.load):
        from megatron_mod.evaluation.megatron_backend import MegatronBackend
        from megatron_mod.training.restore import restore_model

        model, tokenizer = restore_model(args.load, ranks, dtype=dtype)
        return MegatronBackend(model, tokenizer, **settings)
    import torch.distributed as dist

    from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend, load_huggingface

    model, tokenizer = load_huggingface(args.load, dtype=dtype)
    shared = {"data_rank": dist.get_rank(), "data_ranks": dist.get_world_size()}
    return HuggingFaceBackend(model, tokenizer, **settings, **shared)


if __name__ == "__main__":
    main()
