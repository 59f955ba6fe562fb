"""Measure an export against the untouched original; write report.json and print a table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mod.evaluation.quickstart import build_report, table
from megatron_mod.process import one_message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf-path", required=True, help="the untouched Hugging Face folder")
    parser.add_argument("--export", required=True, help="what convert_megatron_to_hf.py wrote")
    parser.add_argument("--run", required=True, help="the training's checkpoint.save folder")
    parser.add_argument("--parity", required=True, help="what compare_logits.py --json wrote")
    parser.add_argument("--ranking", required=True, help="text the static baseline is chosen on")
    parser.add_argument("--held-out", required=True, help="text everything is scored on")
    parser.add_argument("--max-length", type=int, default=256, help="tokens a sample is cut to")
    parser.add_argument("--save", type=Path, required=True, help="the report's file")
    args = vars(parser.parse_args())
    save = args.pop("save")
    with one_message():
        report = build_report(**args)
    save.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("\n" + table(report))


if __name__ == "__main__":
    main()
