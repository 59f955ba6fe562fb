"""Write questions and answers from Python's own documentation as JSON lines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mod.config.errors import one_message
from megatron_mod.data.python_docs import write_splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", required=True, help="folder for the files, one a split")
    parser.add_argument("--validation", type=int, default=24, help="records for validation.jsonl")
    parser.add_argument("--ranking", type=int, default=16, help="records for ranking.jsonl")
    parser.add_argument("--held-out", type=int, default=48, help="records for held_out.jsonl")
    args = parser.parse_args()
    sizes = {
        "validation": args.validation,
        "ranking": args.ranking,
        "held_out": args.held_out,
        "train": 0,
    }
    with one_message():
        for name, path in write_splits(args.save, sizes).items():
            with path.open(encoding="utf-8") as lines:
                print(f"{path}: {sum(1 for _ in lines)} {name} records")


if __name__ == "__main__":
    main()
