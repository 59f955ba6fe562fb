"""The text every Python carries."""

from __future__ import annotations

import json

import pytest

from megatron_mod.data import python_docs
from megatron_mod.data.python_docs import records, write_splits


def test_python_docs_are_real_and_split_without_overlap(tmp_path, monkeypatch):
    found = records()
    assert len(found) > 500
    monkeypatch.setattr(python_docs, "records", lambda: found)
    paths = write_splits(tmp_path, {"held_out": 20, "train": 0})
    read = {name: path.read_text().splitlines() for name, path in paths.items()}
    assert len(read["held_out"]) == 20
    assert not set(read["held_out"]) & set(read["train"])
    completions = [json.loads(line)["completion"] for lines in read.values() for line in lines]
    assert len(set(completions)) == len(completions)
    assert all(120 <= len(text) <= 900 for text in completions)


@pytest.fixture
def few(monkeypatch):
    """Nine records, as all take seconds to read."""
    monkeypatch.setattr(python_docs, "records", lambda: [{"prompt": str(n)} for n in range(9)])


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"validation": -4, "train": 0}, "validation = -4: must be at least 1"),
        ({"validation": 0, "train": 0}, "validation = 0: must be at least 1"),
        (
            {"validation": 10**9, "train": 0},
            "validation = 1000000000: only 9 records are left",
        ),
        ({"validation": 4, "train": -1}, "train = -1: must be at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(tmp_path, few, sizes, said):
    with pytest.raises(ValueError, match=said):
        write_splits(tmp_path / "out", sizes)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path, few):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/out: cannot be written"):
        write_splits(tmp_path / "file" / "out", {"train": 0})
