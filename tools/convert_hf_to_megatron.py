"""Write a local Hugging Face model folder as a Megatron checkpoint for any TP and PP."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mod.conversion.convert import DTYPES, hf_to_megatron
from megatron_mod.parallel import topology
from megatron_mod.process import one_message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf-path", required=True, help="local Hugging Face folder (safetensors)")
    parser.add_argument("--save", required=True, help="new folder for the Megatron checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, help="change the weights' dtype (default: keep)")
    parser.add_argument(
        "--routers",
        help="routers to put beside the weights: a folder of the published Router-Tuning code, or "
        "a training run",
    )
    args = parser.parse_args()
    with one_message(), topology.single_process():
        hf_to_megatron(args.hf_path, args.save, dtype=args.dtype, routers_path=args.routers)
        print(f"Wrote {args.save}: set model.checkpoint to it, at any TP and PP.")


if __name__ == "__main__":
    main()
