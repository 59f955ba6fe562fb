"""From a Hugging Face model to one that skips work, and what that is worth."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import prologue  # noqa: F401
from ranks import gpu_count, torchrun

from megatron_mod.config.recipes import PUBLISHED, as_options
from megatron_mod.config.rules import NewFolder
from megatron_mod.process import one_message, run_command

if TYPE_CHECKING:
    from megatron_mod.model.architecture import Architecture

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "smollm2"
ROUTERS, ROUTERS_AND_ADAPTERS, ADAPTERS = (
    CONFIGS / f"135m_{name}.yaml" for name in ("block_token", "block_token_lora", "lora")
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash launch/quickstart.sh", description=__doc__)
    parser.add_argument("--steps", type=int, help="training steps (default: the configuration's)")
    parser.add_argument(
        "--held-out",
        type=int,
        default=48,
        help="samples that everything is measured on (default: %(default)s); fewer take less time",
    )
    parser.add_argument(
        "--hf-path",
        type=Path,
        help="local Llama-architecture Hugging Face folder (default: SmolLM2-135M-Instruct)",
    )
    parser.add_argument(
        "--lora",
        action="store_true",
        help="adapters train with the routers, which then skip half, and alone to compare with",
    )
    parser.add_argument("--nproc", type=int, help="ranks (default: tensor x pipeline)")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument(
        "--pipeline", type=int, help="pipeline-parallel ranks (default: 2, or 1 where it must be)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "quickstart", help="folder for all results"
    )
    args = parser.parse_args()
    if args.steps is not None and args.steps < 0:
        parser.error(f"--steps {args.steps}: must be at least 0.")
    if args.held_out < 1:
        parser.error(f"--held-out {args.held_out}: must be at least 1.")
    if problem := NewFolder().problem(str(args.out)):
        parser.error(f"--out {args.out}: {problem}.")
    if args.pipeline is None:
        alone = args.tensor > 1 or args.nproc == 1 or gpu_count() == 1
        args.pipeline = 1 if alone else 2
    model_parallel = args.tensor * args.pipeline
    args.nproc = args.nproc or model_parallel
    if min(args.tensor, args.pipeline) < 1 or args.nproc % model_parallel:
        parser.error(
            f"--nproc {args.nproc}: must be a multiple of --tensor {args.tensor} x "
            f"--pipeline {args.pipeline}, all of them at least 1."
        )
    return args


class Steps:
    """Runs the tools one after the other and says where it is."""

    def __init__(self, *, nproc: int) -> None:
        self.nproc = nproc
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        print(f"\n[{time.monotonic() - self.started:4.0f} s] {text}", flush=True)

    def script(self, path: str, *options: object) -> None:
        self._run([sys.executable, ROOT / path, *options], os.environ)

    def ranks(self, script: str, *options: object) -> None:
        """Start a script on all ranks."""
        command, environment = torchrun(self.nproc)
        self._run([*command, ROOT / script, *options], environment)

    def _run(self, command: list, environment: dict) -> None:
        command = [str(part) for part in command]
        status = run_command(command, {**environment, "TQDM_MININTERVAL": "2"})
        if status:
            script = Path(next(part for part in command[1:] if part.endswith(".py")))
            sys.exit(f"\nStopped: {script.name} failed; its message is above.")


def read_architecture(hf_path: Path, *, tensor: int, pipeline: int) -> Architecture:
    """The model's shape, refused here rather than after minutes of work."""
    from megatron_mod.config.ranks import OPTIONS
    from megatron_mod.conversion.families import family_of
    from megatron_mod.conversion.hf_reader import read_config
    from megatron_mod.model.architecture import check_parallel

    hf_config = read_config(hf_path)
    arch = family_of(hf_config).architecture_of(hf_config)
    check_parallel(arch, tensor=tensor, pipeline=pipeline, names=OPTIONS)
    return arch


def fitting(arch: Architecture, config: Path) -> list[str]:
    """Overrides that fit a configuration of SmolLM2-135M to another model: its deeper half is
    routed, or has adapters, or both."""
    deepest = str(max(1, arch.num_layers // 2))
    overrides = ["--data.max_length", str(longest(arch))]
    if config != ADAPTERS:
        overrides += ["--router.layers.deepest", deepest, "--router.stand_in_rank", "null"]
    if config != ROUTERS:
        overrides += ["--lora.layers.deepest", deepest]
    return overrides


def longest(arch: Architecture) -> int:
    """Tokens that samples are cut to, where they are measured."""
    return min(256, arch.max_sequence_length)


def main() -> None:
    args = arguments()
    out, steps = args.out.resolve(), Steps(nproc=args.nproc)
    hf_path, data = args.hf_path, out / "data"
    degrees = {"tensor": args.tensor, "pipeline": args.pipeline}
    if hf_path is not None:
        arch = read_architecture(hf_path, **degrees)
    if hf_path is None:
        steps.say("1/6 Getting SmolLM2-135M-Instruct")
        hf_path = out / "original"
        steps.script("tools/get_smollm2.py", "--save", hf_path)
        arch = read_architecture(hf_path, **degrees)
    steps.say("2/6 Converting it to a Megatron checkpoint, preparing text")
    steps.script(
        "tools/convert_hf_to_megatron.py", "--hf-path", hf_path, "--save", out / "megatron"
    )
    steps.script("tools/make_python_docs.py", "--save", data, "--held_out", args.held_out)

    overrides = ["--model.checkpoint", out / "megatron"]
    overrides += ["--data.train", data / "train.jsonl"]
    overrides += ["--data.validation", data / "validation.jsonl"]
    overrides += ["--parallel.tensor_model_parallel_size", args.tensor]
    overrides += ["--parallel.pipeline_model_parallel_size", args.pipeline]
    if arch.num_layers > 2:  # below the first routed layer there is something to keep
        overrides += ["--train.frozen_prefix", "cache", "--train.prefix_cache", out / "prefix"]
    if args.steps is not None:
        overrides += ["--train.steps", args.steps]

    def train(name: str, config: Path, *settings: str) -> None:
        fitted = [] if args.hf_path is None else fitting(arch, config)
        words = ("--config", config, *overrides, *fitted, *settings)
        steps.ranks("launch/pretrain_router.py", *words, "--checkpoint.save", out / name)

    what = "routers and adapters" if args.lora else "routers"
    steps.say(f"3/6 Training {what} (tensor {args.tensor} x pipeline {args.pipeline})")
    train("run", ROUTERS_AND_ADAPTERS if args.lora else ROUTERS)
    steps.say("    ... and once more by the published recipe, to compare with")
    train("published", ROUTERS, *as_options(PUBLISHED))
    if args.lora:
        steps.say("    ... and the adapters alone, on the dense model")
        train("adapted", ADAPTERS)

    steps.say("4/6 Exporting to Hugging Face")
    steps.script("tools/convert_megatron_to_hf.py", "--load", out / "run", "--save", out / "export")
    steps.say("5/6 Comparing logits: original, Megatron, export")
    steps.ranks(
        "tools/compare_logits.py",
        *("--tensor", args.tensor, "--pipeline", args.pipeline),
        *("--load", out / "megatron", out / "run"),
        *("--hf-path", hf_path, out / "export"),
        *("--json", out / "parity.json"),
    )
    steps.say("6/6 Measuring the export against the untouched original")
    steps.script(
        "launch/quickstart_report.py",
        *("--hf-path", hf_path, "--export", out / "export", "--run", out / "run"),
        *("--published", out / "published", "--parity", out / "parity.json"),
        *(("--adapted", out / "adapted") if args.lora else ()),
        *("--max-length", longest(arch)),
        *("--ranking", data / "ranking.jsonl", "--held-out", data / "held_out.jsonl"),
        *("--save", out / "report.json"),
    )
    steps.say(f"Done: {out / 'report.json'}")


if __name__ == "__main__":
    with one_message():
        main()
