"""Perplexity and lm-eval tasks of a Hugging Face folder or of a Megatron checkpoint.

    python tools/evaluate.py --load EXPORT_DIR --perplexity FILE
    torchrun --standalone --nproc_per_node N tools/evaluate.py --load DIR --tensor T --pipeline P \\
        --tasks NAME ... --include_path DIR --json FILE

The ranks that tensor x pipeline leave over share the texts. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mod.process import one_message


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    args = vars(parser.parse_args())
    is_first_rank = int(os.environ.get("RANK", 0)) == 0
    # Before the libraries read them: no request to a network that may not answer, one progress bar.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if not is_first_rank:
        os.environ["TQDM_DISABLE"] = "1"
    with one_message():
        from megatron_mod.evaluation.request import Request

        tasks = tuple(name for entry in args.pop("tasks") for name in entry.split(",") if name)
        request = Request(**args, tasks=tasks)
        manager = None
        if request.tasks:
            from megatron_mod.evaluation.tasks import find_tasks

            manager = find_tasks(request)
        from megatron_mod.evaluation.load import load_backend
        from megatron_mod.evaluation.report import evaluate, table
        from megatron_mod.parallel import topology

        ranks = topology.plan(
            tensor=request.tensor,
            pipeline=request.pipeline,
            world_size=topology.environment_world_size(),
        )
        topology.initialize(ranks)
        backend = load_backend(
            request.load,
            ranks,
            dtype=request.dtype,
            max_length=request.max_length,
            batch_size=request.batch_size,
            pooling=request.pooling,
            trust_remote_code=request.trust_remote_code,
        )
        report = evaluate(request, backend, manager, is_first_rank=is_first_rank)
        topology.print_once("\n" + table(report))
        if request.json:
            topology.write_once(
                Path(request.json), json.dumps(report, indent=2, default=str) + "\n"
            )
        topology.shutdown()


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--load",
        "--hf-path",
        required=True,
        metavar="DIR",
        help="a Hugging Face folder (export or dense), a base checkpoint, or a training run",
    )
    add(
        "--perplexity",
        metavar="FILE",
        help="conversations (.jsonl), whose answers are scored, or a text",
    )
    add("--tasks", nargs="+", metavar="NAME", default=(), help="lm-eval tasks")
    add("--include_path", "--include-path", metavar="DIR", help="folder with files of tasks")
    add("--num_fewshot", "--num-fewshot", type=int, help="examples before each question")
    add("--limit", type=int, help="so many documents of each task")
    add(
        "--apply_chat_template",
        "--apply-chat-template",
        action="store_true",
        help="ask in the model's chat format",
    )
    add(
        "--pooling",
        choices=("prompt", "all"),
        help="what a sequence's decision sees of a scored text: its context (default), as in "
        "generation, or all of it (default for windows of a running text)",
    )
    add("--batch_size", "--batch-size", type=int, default=1, help="texts run together (1)")
    add("--max_length", "--max-length", type=int, help="most tokens of a text")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--tensor", type=int, default=1, help="tensor-parallel ranks of a Megatron checkpoint")
    add("--pipeline", type=int, default=1, help="pipeline-parallel ranks of a Megatron checkpoint")
    add(
        "--trust-remote-code",
        "--trust_remote_code",
        action="store_true",
        help="run the code that a Hugging Face folder brings (an export's needs no trust)",
    )
    add("--json", metavar="FILE", help="also write the report to this file")


if __name__ == "__main__":
    main()
