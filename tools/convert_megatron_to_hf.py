"""Write a Megatron checkpoint, with the routers trained on it if any, as a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mod.config.errors import one_message
from megatron_mod.conversion.convert import megatron_to_hf
from megatron_mod.parallel import topology


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--load",
        required=True,
        help="a folder of convert_hf_to_megatron.py, a training's checkpoint.save folder "
        "(its latest step), or one of its step folders",
    )
    parser.add_argument("--save", required=True, help="new folder for the Hugging Face model")
    args = parser.parse_args()
    with one_message(), topology.single_process():
        megatron_to_hf(args.load, args.save)
        print(f"Wrote {args.save}: load it with AutoModelForCausalLM.from_pretrained.")


if __name__ == "__main__":
    main()
