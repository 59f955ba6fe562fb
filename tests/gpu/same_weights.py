"""Whether the two Hugging Face folders that are named hold the same weights to the bit."""

from __future__ import annotations

import sys

import torch

from megatron_mod.conversion.hf_reader import HFReader


def main(first: str, second: str) -> int:
    with HFReader(first) as ours, HFReader(second) as theirs:
        differing = ours.names() ^ theirs.names()
        differing |= {
            name
            for name in ours.names() & theirs.names()
            if not torch.equal(ours.tensor(name), theirs.tensor(name))
        }
    print(f"{len(differing)} tensors differ: {sorted(differing)[:10]}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
