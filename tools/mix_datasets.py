"""Mix reformatted corpora into one shuffled file, each in its portion."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mod.data.mixing import DEFAULT_PORTIONS, SEED, mix, parse_portions
from megatron_mod.process import one_message


def main() -> None:
    parser = argparse.ArgumentParser(description=f"{__doc__} Writes SAVE_PATH/data.jsonl.")
    parser.add_argument(
        "--reformatted-dir", default="data/reformatted", help="what reformat_datasets.py wrote"
    )
    parser.add_argument("--save-path", default="data/mixed", help="new folder")
    parser.add_argument(
        "--portions",
        nargs="+",
        metavar="NAME=PORTION",
        help="the sub-folders to mix and how many times each is taken; 2.9 is twice and 90 percent "
        f"more (default: {' '.join(f'{n}={p}' for n, p in DEFAULT_PORTIONS.items())}, those there)",
    )
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    with one_message():
        portions = parse_portions(args.portions) if args.portions else None
        report = mix(args.reformatted_dir, args.save_path, portions=portions, seed=args.seed)
        for name in set(portions or DEFAULT_PORTIONS) - set(report):
            print(f"{name}: not there, so not in the mix")
        for name, part in report.items():
            print(f"{name}: {part['read']} records x {part['portion']} = {part['written']}")
        print(f"Wrote {args.save_path}/data.jsonl: {sum(p['written'] for p in report.values())}")


if __name__ == "__main__":
    main()
