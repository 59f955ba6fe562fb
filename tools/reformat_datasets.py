"""Bring raw instruction corpora to JSON lines of messages."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mod.data.formats import CORPORA, parse_sources, raw_sources, reformat
from megatron_mod.process import one_message


def main() -> None:
    parser = argparse.ArgumentParser(
        description=f"{__doc__} Writes data.jsonl and, with what was dropped, report.json."
    )
    parser.add_argument(
        "--raw-data-root", default="data/raw", help="folder with a sub-folder for each corpus"
    )
    parser.add_argument("--save-path", default="data/reformatted")
    parser.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(CORPORA)} (default: all there)",
    )
    parser.add_argument(
        "--sources",
        nargs="+",
        default=[],
        metavar="NAME=SOURCE",
        help="a corpus that lies elsewhere: a file, a folder, or a dataset's name[:split]",
    )
    args = parser.parse_args()
    with one_message():
        sources = parse_sources(args.sources)
        names = [name for name in args.datasets or () if name not in sources]
        if names or not sources:
            sources |= raw_sources(args.raw_data_root, names)
        for name, source in sources.items():
            print(f"Reading {name} from {source} ...", flush=True)
            print(reformat(name, source, Path(args.save_path) / name), flush=True)


if __name__ == "__main__":
    main()
