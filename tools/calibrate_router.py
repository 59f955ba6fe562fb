"""Set a routed model's thresholds so that it meets a budget, and show what every budget costs.

    python tools/calibrate_router.py --load EXPORT_DIR --data FILE --capacity 0.5
    python tools/calibrate_router.py --load EXPORT_DIR --data FILE --speedup 1.2 --save NEW_DIR
    python tools/calibrate_router.py --load EXPORT_DIR --data FILE --max-perplexity-increase 1%
    torchrun --standalone --nproc_per_node N tools/calibrate_router.py --load RUN_DIR --data FILE \\
        --capacity 0.5 --tensor T --pipeline P

The thresholds go into the folder itself, or into a copy (--save); beside them calibration.json and
calibration.png. Training and its checkpoints' other files are not touched.
"""

from __future__ import annotations

import argparse
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
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if int(os.environ.get("RANK", 0)):
        os.environ["TQDM_DISABLE"] = "1"
    with one_message():
        from megatron_mod.evaluation.budget import BudgetRequest

        request = BudgetRequest(**{**args, "curve": tuple(args["curve"])})
        from megatron_mod.evaluation.calibrate import calibrate
        from megatron_mod.parallel import topology

        ranks = topology.plan(
            tensor=request.tensor,
            pipeline=request.pipeline,
            world_size=topology.environment_world_size(),
        )
        topology.initialize(ranks)
        calibrate(request, ranks)
        topology.shutdown()


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--load", required=True, metavar="DIR", help="an export, or a training run (--capacity)")
    add(
        "--data",
        required=True,
        metavar="FILE",
        help="conversations (.jsonl) or a text, of the kind the model will see",
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--capacity", type=float, help="share of the routed units to keep, 0 to 1")
    budget.add_argument("--speedup", type=float, help="of counted work over the dense model")
    budget.add_argument(
        "--max-perplexity-increase",
        "--max_perplexity_increase",
        metavar="N%",
        help="over the dense model on this data, such as 1%%",
    )
    add("--save", metavar="DIR", help="new folder for a calibrated copy (default: change --load)")
    add(
        "--scope",
        choices=("layer", "model"),
        help="hold every layer to the capacity, or their mean by one threshold (default: as "
        "trained)",
    )
    add(
        "--curve",
        type=float,
        nargs="*",
        default=(0.9, 0.75, 0.6, 0.5, 0.4, 0.25),
        metavar="CAPACITY",
        help="capacities to show beside the budget's (0.9 0.75 0.6 0.5 0.4 0.25)",
    )
    add("--samples", type=int, default=32, help="so many of the data's samples; 0: all (32)")
    add(
        "--pooling",
        choices=("prompt", "all"),
        help="what a sequence's decision sees: its prompt (default), or all of a text",
    )
    add("--batch-size", "--batch_size", type=int, default=1, help="texts run together (1)")
    add("--max-length", "--max_length", type=int, help="most tokens of a text")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--tensor", type=int, default=1, help="tensor-parallel ranks of a training run")
    add("--pipeline", type=int, default=1, help="pipeline-parallel ranks of a training run")


if __name__ == "__main__":
    main()
