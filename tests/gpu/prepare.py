"""Makes what the parts work on: questions and answers of Python's documentation, and, where no
model is given, a random one that has room for them; writes where they are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_mod.data.python_docs import write_splits
from tests.helpers import tiny

SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "initializer_range": 0.05, "vocab_size": tiny.VOCAB,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hf-path", type=Path)
    args = parser.parse_args()
    splits = {"validation": 24, "ranking": 16, "held_out": 48, "train": 0}
    files = write_splits(args.out / "docs", splits)
    model = args.hf_path
    if model is None:
        import torch

        model = tiny.save_llama(args.out / "model", dtype=torch.bfloat16, **SHAPE)
        tiny.save_tokenizer(model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    found = {
        "model": str(model),
        **{name: config[name] for name in ("num_hidden_layers", "hidden_size", "vocab_size")},
        **{name: str(path) for name, path in files.items()},
    }
    (args.out / "prepared.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
