"""What the value of a setting has to be, declared beside the setting itself.

steps: int = setting(Range(least=0))
json: str | None = setting(OutputFile(), default=None)
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

LARGEST = 10**9  # far above any use of a number, and products of such still fit into a float32


class Rule(Protocol):
    """What a value has to be."""

    def problem(self, value: Any) -> str | None:
        """The constraint, and the remedy where there is one, if the value does not meet it."""


def setting(rule: Rule | None = None, *, default: Any = MISSING, **metadata: Any) -> Any:
    """A dataclass field whose value has to meet a rule.

    Args:
        rule: for the value; for each number or path of a list or mapping.
        default: a list or dictionary is copied for each instance; without one the field is
            required.
        metadata: what the command line makes of the field (``cli.parse_options``).
    """
    metadata = {"rule": rule, **metadata}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check(settings: Any, *, name: Callable[[str, Any], str], only: type = object) -> None:
    """Refuse the first value of a dataclass that does not meet its field's rule.

    Args:
        name: how the user calls a field and its value.
        only: rules of this kind.

    Raises:
        ValueError: naming the field, its value, the constraint and the remedy.
    """
    for each in dataclasses.fields(settings):
        rule = each.metadata.get("rule")
        if not isinstance(rule, only) or rule is None:
            continue
        for value in _parts(getattr(settings, each.name)):
            if problem := rule.problem(value):
                raise ValueError(f"{name(each.name, value)}: {problem}.")


def _parts(value: Any) -> Iterator[Any]:
    """A value, or those in a list or mapping; nothing of what is not set."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _parts(part)
    elif value is not None:
        yield value


@dataclass(frozen=True)
class Range:
    """Finite numbers within borders.

    Args:
        least, most: borders that belong to the range.
        above, below: borders that do not.
        why: what a user should know who left the range.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    why: str = ""

    def problem(self, value: float | str) -> str | None:
        if isinstance(value, str):  # a word that the field's type allows in a number's place
            return None
        inside = all(
            (  # written so that nan, which compares as false, is outside
                self.least is None or value >= self.least,
                self.above is None or value > self.above,
                self.most is None or value <= self.most,
                self.below is None or value < self.below,
            )
        )
        if not inside:
            return f"must be {self._words()}{self.why}"
        if self.most is None and self.below is None and not value <= LARGEST:
            return f"must be {self._words()} and at most {LARGEST:.0e}"
        return None

    def _words(self) -> str:
        lower = "above" if self.least is None else "at least"
        first, last = _either(self.least, self.above), _either(self.most, self.below)
        if last is None:
            return f"{lower} {first:g}"
        if self.least is None:
            return f"above {first:g} and {'at most' if self.below is None else 'below'} {last:.10g}"
        return f"{first:g} to {'' if self.below is None else 'below '}{last:.10g}"


def _either(inclusive: float | None, exclusive: float | None) -> float | None:
    return exclusive if inclusive is None else inclusive


AT_LEAST_0 = Range(least=0)
COUNT = Range(least=1)
SHARE = Range(least=0, most=1)
SEED = Range(least=0, most=2**32 - 1)


class Size:
    """A number of bytes such as ``5GB``, ``500MB``, ``2GiB`` or ``1000``."""

    UNITS: ClassVar = {
        "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
        "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    }  # fmt: skip

    @classmethod
    def bytes_of(cls, text: str) -> int | None:
        """``None``: it is no size, or none above zero."""
        match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
        if not match or match[2].upper() not in cls.UNITS:
            return None
        return int(float(match[1]) * cls.UNITS[match[2].upper()]) or None

    def problem(self, value: str) -> str | None:
        return None if self.bytes_of(value) else "give a size such as 5GB, 500MB or 2GiB"


class Percentage:
    """A percentage from 0 up, such as ``1%``."""

    @staticmethod
    def share_of(text: str) -> float | None:
        """0.01 of ``1%``; ``None``: it is no percentage."""
        match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*%", text.strip())
        return float(match[1]) / 100 if match else None

    def problem(self, value: str) -> str | None:
        is_one = self.share_of(value) is not None
        return None if is_one else "write a percentage from 0 up, such as 1%"


class InputFile:
    """A file that is there."""

    def problem(self, value: str) -> str | None:
        if Path(value).is_dir():
            return "is a folder; give a file"
        if not Path(value).exists():
            return "no such file"
        return None if os.access(value, os.R_OK) else "may not be read"


class InputFolder:
    """A folder that is there."""

    def problem(self, value: str) -> str | None:
        if Path(value).is_dir():
            return None if os.access(value, os.R_OK | os.X_OK) else "may not be read"
        return "is a file; give a folder" if Path(value).exists() else "no such folder"


class OutputFile:
    """A file that can be written, in a folder that is there."""

    def problem(self, value: str) -> str | None:
        path = Path(value).absolute()
        if path.is_dir():
            return "is a folder; give a file"
        if path.exists():
            return None if os.access(path, os.W_OK) else "may not be written"
        if path.parent.exists():
            return _closed(path.parent)
        return _closed(_nearest(path)) or "its folder does not exist; make it first"


class OutputFolder:
    """A folder that can be filled, or made."""

    def problem(self, value: str) -> str | None:
        return _closed(_nearest(Path(value).absolute()))


class NewFolder:
    """A folder that does not exist and can be made."""

    def problem(self, value: str) -> str | None:
        if os.path.lexists(value):
            return "already exists; remove it or give another output folder"
        return OutputFolder().problem(value)


def _nearest(path: Path) -> Path:
    """The path, or the nearest one above it that exists."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def _closed(place: Path) -> str | None:
    """Why nothing can be put into a path, if so; a read-only file system counts for everybody."""
    if not place.is_dir():
        return f"{place} is not a folder; give another place"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} may not be written to; give another place"
    return None
