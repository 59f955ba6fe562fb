"""Records out of JSON lines and JSON arrays, one at a time.

Both are cut into the text of single records first, so that a record is judged alike in either, and
no more than one is held. A streaming JSON parser is not used for arrays: ``ijson`` reads half a
surrogate pair as "?", takes memory that is quadratic in how deeply a record is nested, and cannot
go on after a record that is no JSON.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

MOST_BYTES = 64 * 2**20  # of a record
MOST_LEVELS = 100  # of lists and objects inside each other
_CHUNK = 2**18
_WHITE = b" \t\r\n"
# Outside of strings: what structures an array, or a byte that cannot stand there.
_OUTSIDE = re.compile(rb'["\[\]{},]|[^0-9a-zA-Z+\-.:\s]')
# In a string: its end, an escaped character, or a byte that cannot stand there.
_INSIDE = re.compile(rb'"|\\.|[\x00-\x1f]', re.DOTALL)


@dataclass(frozen=True)
class Record:
    """One record as it was found: its place (line or running number, from 1) and its content.

    ``problem`` says why it could not be read, and ``content`` is then its text as far as known.
    """

    number: int
    content: object
    problem: str | None = None


def read_json(path: Path) -> Iterator[Record]:
    """The records of a file of JSON lines or of one JSON array; blank lines are none.

    Raises:
        ValueError: an array that ends or goes wrong between records; what follows is then unknown.
        OSError: as the system says.
    """
    with path.open("rb") as file:
        texts = _elements(file, path) if _starts_array(file) else _lines(file)
        for number, text in texts:
            yield _decoded(number, text)


def _starts_array(file: BufferedReader) -> bool:
    """Whether a file holds one array, which is then read up to its bracket; else it is rewound."""
    file.seek(len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0)
    start = file.tell()
    while byte := file.read(1):
        if byte not in _WHITE:
            if byte == b"[":
                return True
            break
    file.seek(start)
    return False


def _lines(file: BufferedReader) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(MOST_BYTES + 1):
        number += 1
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(MOST_BYTES)
        if line.strip():
            yield number, line


def _elements(file: BufferedReader, path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and text of each element of an array, whose bracket has been read."""
    number, text, depth, in_string, in_escape = 1, bytearray(), 1, False, False

    def wrong(what: str) -> ValueError:
        return ValueError(
            f"{path}:{number}: not JSON: {what}; the array cannot be read any further. Repair the "
            "file, or make it JSON lines."
        )

    while chunk := file.read(_CHUNK):
        start, at = 0, int(in_escape)
        while match := (_INSIDE if in_string else _OUTSIDE).search(chunk, at):
            at, mark = match.end(), match.group()
            if mark == b'"':
                in_string = not in_string
            elif in_string:
                if len(mark) == 1:
                    raise wrong(f"byte {mark[0]:#04x} in a text")
            elif mark in b"[{":
                depth += 1
            elif mark in b"]}":
                depth -= 1
            elif mark != b",":
                raise wrong(f"byte {mark[0]:#04x} where none can be")
            if depth == 0 or (depth == 1 and mark == b"," and not in_string):
                _add(text, chunk[start : at - 1])
                if text.strip() or number > 1 or depth:
                    yield number, bytes(text)
                if not depth:
                    rest = chunk[at:].strip(_WHITE)
                    while not rest and (chunk := file.read(_CHUNK)):
                        rest = chunk.strip(_WHITE)
                    if rest:
                        raise wrong("more follows where the array has ended")
                    return
                number, start = number + 1, at
                text.clear()
        in_escape = in_string and chunk[at:].endswith(b"\\")
        _add(text, chunk[start:])
    raise wrong("the file ends within the array")


def _add(text: bytearray, piece: bytes) -> None:
    """Append, as long as the text is not too long for a record anyway."""
    if len(text) <= MOST_BYTES:
        text += piece


def _decoded(number: int, text: bytes) -> Record:
    if len(text) > MOST_BYTES:
        start = text[:1000].decode("utf-8", errors="replace")
        return Record(number, start, f"longer than {MOST_BYTES} bytes")
    try:
        content = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return Record(number, _shown(text), f"not UTF-8: {error}")
    except _Twice as error:
        return Record(number, _shown(text), str(error))
    except ValueError as error:
        # What follows a semicolon is advice to a programmer.
        return Record(number, _shown(text), f"not JSON: {str(error).split(';')[0]}")
    except RecursionError:
        return Record(number, _shown(text), _TOO_DEEP)
    if text.count(b"[") + text.count(b"{") > MOST_LEVELS and _is_deep(content):
        return Record(number, _shown(text), _TOO_DEEP)
    return Record(number, content)


_TOO_DEEP = f"lists and objects inside each other in more than {MOST_LEVELS} levels"


class _Twice(ValueError):
    """A key that an object has twice: which of the values counts is anybody's guess."""


def _unique(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Twice(f"key {twice!r} twice in one object")
    return content


def _is_deep(content: object) -> bool:
    level = [content]
    for _ in range(MOST_LEVELS):
        inner = [item for item in level if isinstance(item, list | dict)]
        level = [v for item in inner for v in (item.values() if type(item) is dict else item)]
    return any(isinstance(item, list | dict) for item in level)


def _shown(text: bytes) -> str:
    return text.decode("utf-8", errors="replace").rstrip("\r\n")
