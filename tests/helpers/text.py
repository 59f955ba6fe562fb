"""Text for tests: JSON lines made on the spot, and real text where there is some."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def real_text(name: str) -> Path:
    """A file of real text, from ``$MEGATRON_MOD_TEXT`` or a folder ``shared/data`` in the checkout
    or beside it; the test is skipped without one."""
    folders = [Path(os.environ.get("MEGATRON_MOD_TEXT", "/nowhere")), ROOT / "shared" / "data"]
    for folder in (*folders, ROOT.parent / "shared" / "data"):
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"needs {name} in $MEGATRON_MOD_TEXT or in shared/data")


def alpaca() -> Path:
    """999 records of Alpaca, raw."""
    return real_text("alpaca_data.json")


def wiki() -> Path:
    """English articles, one a line."""
    return real_text("wiki.txt")


def write_lines(path: Path, records: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def read_lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
