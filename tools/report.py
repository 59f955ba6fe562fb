"""Write a training run as one self-contained HTML page.

    python tools/report.py RUN_DIR
    torchrun --standalone --nproc_per_node N tools/report.py RUN_DIR --tensor T --pipeline P

RUN_DIR/report.html shows loss, capacity, decisions, scores, skipped tokens, quality against work
beside static removal, and the configuration; RUN_DIR/report/ has the figures as PNG. The newest
checkpoint is run on the validation data, which takes a while (--without-model leaves it out).
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
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if int(os.environ.get("RANK", 0)):
        os.environ["TQDM_DISABLE"] = "1"
    with one_message():
        check(args, parser)
        from megatron_mod.parallel import topology
        from megatron_mod.parallel.agree import on_first_rank
        from megatron_mod.report.page import FIGURES, write_page
        from megatron_mod.report.run import read_run

        run = read_run(args.run)
        ranks = topology.plan(
            tensor=args.tensor,
            pipeline=args.pipeline,
            world_size=topology.environment_world_size(),
        )
        topology.initialize(ranks)
        measured = None
        if run.routing and not args.without_model:
            from megatron_mod.report.measured import measure

            measured = measure(
                run,
                ranks,
                data=args.data,
                samples=args.samples,
                capacities=args.curve,
                dtype=args.dtype,
                batch_size=args.batch_size,
                say=topology.print_once,
            )
        path = on_first_rank(lambda: str(write_page(run, measured)))
        topology.print_once(f"Wrote {path}; its figures are in {run.folder / FIGURES}")
        topology.shutdown()


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN_DIR", help="checkpoint.save of a training, finished or not")
    add("--data", metavar="FILE", help="documents to run (default: the run's validation data)")
    add("--samples", type=int, default=32, help="so many of the documents; 0: all (32)")
    add(
        "--curve",
        type=float,
        nargs="*",
        default=(0.9, 0.75, 0.5, 0.25),
        metavar="CAPACITY",
        help="capacities at which quality is measured (0.9 0.75 0.5 0.25)",
    )
    add("--without-model", action="store_true", help="show only what the training itself wrote")
    add("--batch-size", "--batch_size", type=int, default=1, help="documents run together (1)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--tensor", type=int, default=1, help="tensor-parallel ranks")
    add("--pipeline", type=int, default=1, help="pipeline-parallel ranks")


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse values out of range before anything is read."""
    if args.samples < 0:
        raise ValueError(f"--samples {args.samples}: must be at least 1, or 0 for all.")
    if any(not 0 <= capacity <= 1 for capacity in args.curve):
        raise ValueError(f"--curve {args.curve}: capacities are from 0 (skip all) to 1.")
    for name in ("data", "samples", "curve", "batch_size", "dtype") if args.without_model else ():
        if (value := getattr(args, name)) != parser.get_default(name):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {value}: would be ignored by --without-model; drop one.")


if __name__ == "__main__":
    main()
