"""What lies beside a model's weights: its config, tokenizer and generation settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from megatron_mod.conversion.hf_reader import COMPANION_FILES, member, read_json

TOKENIZER = "tokenizer.json"


def check_companions(folder: Path) -> int:
    """Refuse a folder of which one of these files is broken, whether or not it is all there; gives
    their size in bytes.

    Raises:
        ValueError: naming the file.
    """
    present = [name for name in COMPANION_FILES if (folder / name).is_file()]
    for name in present:
        path = member(folder, name)
        if name == TOKENIZER:
            _check_tokenizer(path)
        elif name.endswith(".json"):
            read_json(folder, name)
    return sum((folder / name).stat().st_size for name in present)


def _check_tokenizer(path: Path) -> None:
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: is no tokenizer: {error}") from error


def copy_companions(source: Path, target: Path, *, dtype: str | None = None) -> None:
    """Copy config, tokenizer and generation settings; the config tells of a changed dtype.

    Raises:
        ValueError: one of them is a link that leads out of the folder.
    """
    target.mkdir(exist_ok=True)
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(member(source, name), target / name)
    if dtype:
        path = target / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        key = "dtype" if "dtype" in config else "torch_dtype"
        path.write_text(json.dumps({**config, key: dtype}, indent=2) + "\n", encoding="utf-8")
