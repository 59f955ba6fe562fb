"""Records out of JSON, JSON lines, Parquet, texts and named datasets, one at a time.

``datasets`` reads what has a name only. Its JSON reader guesses types over many records (a text
that looks like a date becomes one, and a number among texts turns all of them into quoted JSON) and
can name neither the line nor get past a bad one; its Parquet reader holds a whole row group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_mod.data.json_records import MOST_BYTES, Record, read_json

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
TEXT = ".txt"  # a file that is one record, a text
_PIECE = 2**16  # bytes of a Parquet file read at once


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn what the system says against reading a source into one message.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read: {error.strerror or _first_line(error)}; correct that, or "
            "give another file."
        ) from error


def files_of(source: str | Path, *, prefer: str | None = None) -> list[Path]:
    """The data files of a local file or folder (all below it, by name; texts where there is nothing
    else), or none: a dataset's name.

    Args:
        prefer: name of the file that is taken alone when a folder has it.

    Raises:
        ValueError: a folder without data files, a file of another kind, or a path to nothing.
    """
    path, known = Path(source), (*SUFFIXES, TEXT)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in known and _visible(p, path))
        found = [p for p in files if p.name == prefer]
        found = found or [p for p in files if p.suffix != TEXT] or files
        if not found:
            raise ValueError(f"{path}: no data file in it ({', '.join(known)}).")
        return found
    if path.is_file():
        if path.suffix not in known:
            raise ValueError(f"{path}: cannot read this kind of file; give {', '.join(known)}.")
        return [path]
    if path.suffix in known or path.is_absolute() or str(source).startswith("."):
        raise ValueError(f"{path}: no such file; give a file, a folder or a dataset's name.")
    return []


def _visible(path: Path, root: Path) -> bool:
    return path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)


def read_file(path: Path) -> Iterator[Record]:
    """The records of one local file, in order; blank lines are none.

    Raises:
        ValueError: it cannot be read, from the start or from some record on.
    """
    with reading(path):
        if path.suffix == TEXT:
            yield _text(path)
        else:
            yield from _parquet(path) if path.suffix == ".parquet" else read_json(path)


def load_named(name: str):
    """A dataset by its name, or ``name:split`` (default split ``train``), memory-mapped.

    Raises:
        ValueError: it cannot be loaded.
    """
    import datasets  # two seconds: only for those who read with it

    datasets.disable_progress_bars()
    repository, _, split = name.partition(":")
    try:
        return datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # the library and its network clients raise many kinds
        raise ValueError(
            f"{name}: no such file here, and no dataset of that name can be loaded "
            f"({type(error).__name__}: {_first_line(error)})."
        ) from error


def read_dataset(dataset, *, name: str) -> Iterator[Record]:
    """The records of what ``load_named`` gave.

    Raises:
        ValueError: it cannot be read.
    """
    with reading(name):
        for number, row in enumerate(dataset, start=1):
            yield Record(number, row)


def content_bytes(source) -> int:
    """How large a file (``Path``), or what ``load_named`` gave, is without compression; what is
    made of it takes room by that.

    Raises:
        ValueError: it cannot be read.
    """
    if not isinstance(source, Path):
        return source.data.nbytes
    with reading(source):
        if source.suffix != ".parquet":
            return source.stat().st_size
        with _opened_parquet(source) as file:
            groups = range(file.metadata.num_row_groups)
            return sum(file.metadata.row_group(n).total_byte_size for n in groups)


def text_bytes(content: object) -> int:
    """The text in a record, in bytes of UTF-8."""
    total, items = 0, [content]
    while items:
        item = items.pop()
        if isinstance(item, str):
            total += len(item.encode("utf-8", errors="replace"))
        elif isinstance(item, dict):
            items += item.keys()
            items += item.values()
        elif isinstance(item, list | tuple):
            items += item
    return total


@contextlib.contextmanager
def _opened_parquet(path: Path) -> Iterator:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as raw:
        try:
            # The buffer has the file read piece by piece, not a row group at a time.
            with pq.ParquetFile(
                raw, buffer_size=_PIECE, pre_buffer=False, page_checksum_verification=True
            ) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path}: not a Parquet file, or a damaged one: {_first_line(error)}; replace it."
            ) from error


def _parquet(path: Path) -> Iterator[Record]:
    """Row by row: the least that is held is a page of each column."""
    with _opened_parquet(path) as file:
        for number, batch in enumerate(file.iter_batches(batch_size=1), start=1):
            yield _row(number, batch)


def _text(path: Path) -> Record:
    if path.stat().st_size > MOST_BYTES:
        problem = f"larger than {MOST_BYTES} bytes; cut it, or give JSON lines with a 'text' each"
        return Record(1, None, problem)
    try:
        return Record(1, {"text": path.read_bytes().decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        return Record(1, None, f"not UTF-8: {error}")


def _row(number: int, batch) -> Record:
    try:
        (content,) = batch.to_pylist()
    except UnicodeDecodeError as error:
        return Record(number, None, f"not UTF-8: {error}")
    except (ValueError, OverflowError) as error:  # a time that Python has none for, say
        return Record(number, None, f"cannot be read: {_first_line(error)}")
    return Record(number, content)


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [""])[0]
