"""The text every Python carries."""

from __future__ import annotations

import json

from megatron_mod.data.python_docs import records, write_splits


def test_python_docs_are_real_and_split_without_overlap(tmp_path):
    assert len(records()) > 500
    paths = write_splits(tmp_path, {"held_out": 20, "train": 0})
    read = {name: path.read_text().splitlines() for name, path in paths.items()}
    assert len(read["held_out"]) == 20
    assert not set(read["held_out"]) & set(read["train"])
    completions = [json.loads(line)["completion"] for lines in read.values() for line in lines]
    assert len(set(completions)) == len(completions)
    assert all(120 <= len(text) <= 900 for text in completions)
