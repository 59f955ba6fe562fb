"""Write a Megatron checkpoint, with the routers trained on it if any, as a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mod.conversion.convert import DTYPES, export_routers, megatron_to_hf, parse_size
from megatron_mod.parallel import topology
from megatron_mod.process import one_message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--load",
        required=True,
        help="a folder of convert_hf_to_megatron.py, a training's checkpoint.save folder "
        "(its latest step), or one of its step folders",
    )
    parser.add_argument("--save", required=True, help="new folder for the Hugging Face model")
    parser.add_argument("--base", help="where a run's base checkpoint is now, if it was moved")
    parser.add_argument("--dtype", choices=DTYPES, help="change the weights' dtype (default: keep)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file (default: 5GB)")
    parser.add_argument(
        "--routers",
        help="export a base with these routers: a folder of the published Router-Tuning code, or a "
        "training run",
    )
    parser.add_argument(
        "--routers-only",
        action="store_true",
        help="write the routers alone, as the published Router-Tuning code saves them",
    )
    args = parser.parse_args()
    if args.routers_only and (args.routers or args.dtype):
        parser.error("--routers-only writes --load's routers as they are: no --routers, no --dtype")
    with one_message(), topology.single_process():
        if args.routers_only:
            export_routers(args.load, args.save, base=args.base)
            print(f"Wrote {args.save}: routers alone, for the published code or --routers.")
            return
        megatron_to_hf(
            args.load,
            args.save,
            base=args.base,
            dtype=args.dtype,
            max_shard_bytes=parse_size(args.max_shard_size),
            routers_path=args.routers,
        )
        print(f"Wrote {args.save}: load it with AutoModelForCausalLM.from_pretrained.")


if __name__ == "__main__":
    main()
