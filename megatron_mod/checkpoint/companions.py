"""Files of Hugging Face folders, which may come from anywhere: config, tokenizer, settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from tokenizers import Tokenizer

# Everything a user needs beside the weights to run the model: copied along as it is.
COMPANION_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TOKENIZER = "tokenizer.json"
_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def read_json(folder: Path, name: str) -> dict:
    """A JSON object of a model folder.

    Raises:
        ValueError: the file holds something else, or lies outside of the folder.
    """
    path = member(folder, name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object.")
    return values


def member(folder: Path, name: str) -> Path:
    """A file of a model folder, which may come from anywhere, by its name in there.

    A link is followed within the folder and, from a snapshot in Hugging Face's own cache, to the
    blobs that the cache keeps of it.

    Raises:
        ValueError: the name, or a link, leads out of the folder.
    """
    path = folder / name
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise ValueError(
            f"{folder}: names {name!r} as a file of its own, which lies outside of it."
        )
    if not path.exists():
        return path
    root, target = folder.resolve(), path.resolve()
    if target.is_relative_to(root) or _is_own_blob(target, root):
        return path
    raise ValueError(
        f"{path}: is a link to {target}, outside of the model's folder; put the file itself there."
    )


def _is_own_blob(target: Path, snapshot: Path) -> bool:
    """Whether a file is the content of a snapshot ``CACHE/models--NAME/snapshots/REVISION``: it
    lies in ``models--NAME/blobs``, or by its hash in ``CACHE/blobs``."""
    model = snapshot.parent.parent
    if snapshot.parent.name != "snapshots" or not model.name.startswith("models--"):
        return False
    if target.is_relative_to(model / "blobs"):
        return True
    shared = model.parent / "blobs"
    return target.is_relative_to(shared) and bool(
        _SHARED_BLOB.fullmatch(target.relative_to(shared).as_posix())
    )


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
    write_companions(read_companions(source, dtype=dtype), target)


def read_companions(source: Path, *, dtype: str | None = None) -> dict[str, bytes]:
    """What ``copy_companions`` copies, by file."""
    found = {
        name: member(source, name).read_bytes()
        for name in COMPANION_FILES
        if (source / name).is_file()
    }
    if dtype:
        config = json.loads(found["config.json"].decode())
        key = "dtype" if "dtype" in config else "torch_dtype"
        found["config.json"] = (json.dumps({**config, key: dtype}, indent=2) + "\n").encode()
    return found


def write_companions(files: Mapping[str, bytes], target: Path) -> None:
    """Write such files, which may have been read long ago, into a folder that is made if need
    be."""
    target.mkdir(exist_ok=True)
    for name, content in files.items():
        (target / name).write_bytes(content)
