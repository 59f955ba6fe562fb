"""Checksums beside the files of an export, which is a Hugging Face folder and has no manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_mod.checkpoint.checksums import file_table, verify
from megatron_mod.checkpoint.companions import COMPANION_FILES, member, read_json
from megatron_mod.checkpoint.folders import write_durably
from megatron_mod.checkpoint.manifest import manifest_text
from megatron_mod.config.model_folder import ADAPTER

FILE = "checksums.json"
_WEIGHTS = (".safetensors", ".safetensors.index.json")


def write_checksums(folder: Path) -> None:
    """Describe a folder's weights, config and tokenizer. Its modelling file is not among them: that
    is compared with this package's own."""
    table = file_table(folder, model_files(folder), together=False)
    write_durably(folder / FILE, manifest_text({"files": table}))


@contextlib.contextmanager
def as_written(folder: str | Path) -> Iterator[None]:
    """Read a Hugging Face folder in the block; if it has checksums beside its files, they hold.

    They are looked at last, as what is wrong with a file often says more, and then as well.

    Raises:
        ValueError: a file is not what was written; it is named.
    """
    folder = Path(folder)
    try:
        yield
    except ValueError as error:
        if (damage := _damage(folder)) and damage not in str(error):
            raise ValueError(f"{error} {damage}") from error
        raise
    if damage := _damage(folder):
        raise ValueError(damage)


def _damage(folder: Path) -> str | None:
    if not (folder / FILE).exists():
        return None
    try:
        values = read_json(folder, FILE)
        if member(folder, FILE).read_text(encoding="utf-8") != manifest_text(values):
            raise ValueError(f"{folder / FILE}: its content is not what was written.")
        verify(folder, values["files"], together=False)
    except ValueError as error:
        return f"{error} If it was changed on purpose, remove {folder / FILE}."
    return None


def model_files(folder: Path) -> list[str]:
    """A Hugging Face folder's weights, config and tokenizer, or those of an adapter, by name."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return [n for n in names if n in (*COMPANION_FILES, ADAPTER) or n.endswith(_WEIGHTS)]
