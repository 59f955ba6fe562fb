"""An export that continues prompts on the device: what it wrote, skipped and took."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["What is a list comprehension?", "Write a function that", "The capital of France is"]
NEW = 48


@torch.no_grad()
def generate(folder: str, attention: str, dtype: torch.dtype) -> dict:
    """With one attention; a first, short generation is not timed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, attn_implementation=attention
    ).to(device)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True).to(device)
    inputs.pop("token_type_ids", None)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    model.generate(**inputs, max_new_tokens=4, **settings)
    began = time.perf_counter()
    made = model.generate(**inputs, max_new_tokens=NEW, **settings)  # whose tokens wait for it
    texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :])
    seconds = time.perf_counter() - began
    report = model.routing_report()
    return {
        "tokens_per_second": NEW * len(PROMPTS) / seconds,
        "capacity": report["capacity"],
        "cache_bytes_saved": report["cache_bytes_saved"],
        "texts": texts,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    found: dict = {}
    for attention in ("sdpa", "eager", "flash_attention_2"):
        try:
            found[attention] = generate(args.export, attention, torch.bfloat16)
        except ImportError as error:
            found[attention] = {"left_out": str(error).splitlines()[0]}
    speed = found["sdpa"]["tokens_per_second"]
    found["summary"] = f"{speed:.0f} tokens/s, capacity {found['sdpa']['capacity']:.2f}"
    args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
