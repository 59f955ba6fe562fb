"""Records out of JSON, JSON lines, Parquet and named datasets, one at a time.

Parquet and named datasets are read by ``datasets``. JSON is not: its reader there guesses
types over many records (a text that looks like a date becomes one, and a number among texts
turns all of them into quoted JSON) and can name neither the line nor get past a bad one.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ijson

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Record:
    """One record as it was found: its place (line or running number, from 1) and its content.

    ``problem`` says why it could not be read, and ``content`` is then its text as far as known.
    """

    number: int
    content: object
    problem: str | None = None


def files_of(source: str | Path, *, prefer: str | None = None) -> list[Path]:
    """The data files of a local file or folder (all below it, by name), or none: a dataset's name.

    Args:
        prefer: name of the file that is taken alone when a folder has it.

    Raises:
        ValueError: a folder without data files, a file of another kind, or a path to nothing.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and _visible(p, path))
        found = [p for p in found if p.name == prefer] or found
        if not found:
            raise ValueError(f"{path}: no data file in it ({', '.join(SUFFIXES)}).")
        return found
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: cannot read this kind of file; give {', '.join(SUFFIXES)}.")
        return [path]
    if path.suffix in SUFFIXES or path.is_absolute() or str(source).startswith("."):
        raise ValueError(f"{path}: no such file; give a file, a folder or a dataset's name.")
    return []


def _visible(path: Path, root: Path) -> bool:
    return path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)


def read_file(path: Path) -> Iterator[Record]:
    """The records of one local file, in order; blank lines are none."""
    if path.suffix == ".parquet":
        return _numbered(_datasets().load_dataset(
            "parquet", data_files=[str(path)], split="train", streaming=True
        ))  # fmt: skip
    return _array(path) if _starts_array(path) else _lines(path)


def load_named(name: str):
    """A dataset by its name, or ``name:split`` (default split ``train``), memory-mapped.

    Raises:
        ValueError: it cannot be loaded.
    """
    repository, _, split = name.partition(":")
    try:
        return _datasets().load_dataset(repository, split=split or "train")
    except Exception as error:  # the library and its network clients raise many kinds
        raise ValueError(
            f"{name}: no such file here, and no dataset of that name can be loaded "
            f"({type(error).__name__}: {_first_line(error)})."
        ) from error


def read_named(name: str) -> Iterator[Record]:
    """The records of a dataset given by name."""
    return _numbered(load_named(name))


def _datasets():
    import datasets  # two seconds: only for those who read or write with it

    datasets.disable_progress_bars()
    return datasets


def _numbered(rows: Sequence[dict]) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield Record(number, row)


def _starts_array(path: Path) -> bool:
    with path.open("rb") as file:
        while chunk := file.read(4096):
            if text := chunk.lstrip(b"\xef\xbb\xbf \t\r\n"):
                return text.startswith(b"[")
    return False


def _lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield Record(number, json.loads(line.decode("utf-8-sig")))
            except UnicodeDecodeError as error:
                text = line.decode("utf-8", errors="replace").rstrip("\n")
                yield Record(number, text, f"not UTF-8: {error}")
            except ValueError as error:
                yield Record(number, line.decode("utf-8").rstrip("\n"), f"not JSON: {error}")


def _array(path: Path) -> Iterator[Record]:
    """The elements of one JSON array, without holding more than one of them.

    Raises:
        ValueError: what is not JSON; where the next element would start is then unknown, so there
            is nothing to go on with.
    """
    number = 0
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        try:
            for number, element in enumerate(ijson.items(file, "item", use_float=True), start=1):
                yield Record(number, element)
        except ijson.JSONError as error:
            raise ValueError(
                f"{path}:{number + 1}: not JSON (or not UTF-8): {_first_line(error)}; the array "
                "cannot be read any further. Repair the file, or make it JSON lines."
            ) from error


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [""])[0]
