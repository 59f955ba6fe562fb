"""Ways in which a Hugging Face folder is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def edit_config(folder: Path, *dropped: str, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in dropped}))


def edit_tensors(folder: Path, *dropped: str, **changes: torch.Tensor) -> None:
    """Remove tensors, and set others (``__`` in a name is a dot)."""
    tensors = load_file(folder / WEIGHTS)
    tensors.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
    save_file({k: v for k, v in tensors.items() if k not in dropped}, folder / WEIGHTS)


def put(folder: Path, name: str, value: float) -> None:
    """Set one element of a tensor."""
    tensors = load_file(folder / WEIGHTS)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / WEIGHTS)


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def misshape(folder: Path) -> None:
    """A header whose offsets do not fit the shapes it gives."""
    path = folder / WEIGHTS
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    next(entry for name, entry in header.items() if "shape" in entry)["shape"][0] += 1
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


UP = "model.layers.1.mlp.up_proj.weight"
# name: (what breaks a folder, what the message says)
DAMAGES = {
    "tensor missing": (lambda f: edit_tensors(f, UP), f"tensors are missing: {UP}"),
    "tensor of no model": (
        lambda f: edit_tensors(f, model__layers__9__x=torch.zeros(3)),
        "model.layers.9.x",
    ),
    "NaN": (lambda f: put(f, UP, float("nan")), f"{WEIGHTS}: {UP} holds NaN or infinity"),
    "infinity": (lambda f: put(f, UP, float("-inf")), f"{WEIGHTS}: {UP} holds NaN or infinity"),
    "cut short": (truncate, "model.safetensors: not a whole safetensors file"),
    "misshapen": (misshape, "model.safetensors: not a whole safetensors file"),
    "empty weights": (
        lambda f: (f / WEIGHTS).write_bytes(b""),
        "model.safetensors: not a whole safetensors file",
    ),
    "another shape": (lambda f: edit_config(f, intermediate_size=128), "shape"),
    "layers in words": (
        lambda f: edit_config(f, num_hidden_layers="six"),
        "config.json: num_hidden_layers = 'six': must be a whole number above 0",
    ),
    "no object": (lambda f: (f / "config.json").write_text("[1]"), "must hold a JSON object"),
    "Latin-1": (
        lambda f: (f / "config.json").write_bytes('{"ä": 1}'.encode("latin-1")),
        "config.json: not valid JSON",
    ),
    "empty tokenizer": (lambda f: (f / "tokenizer.json").write_text(""), "tokenizer.json"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "tokenizer settings": (
        lambda f: (f / "tokenizer_config.json").write_text("[]"),
        "tokenizer_config.json: must hold a JSON object",
    ),
    "generation settings": (
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json: not valid JSON",
    ),
    "output layer beside a tied embedding": (
        lambda f: edit_config(f, tie_word_embeddings=True),
        "lm_head.weight is not model.embed_tokens.weight",
    ),
}
