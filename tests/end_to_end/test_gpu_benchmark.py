"""``tools/benchmark/gpu.py`` with a tiny shape; what it says of time is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mod.benchmark import decode_attention, decode_host, gpu
from megatron_mod.commands import benchmark_gpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_part_writes_its_rows(tmp_path):
    report = tmp_path / "gpu.json"
    parts = ["dense", "inference"]
    command = [sys.executable, "tools/benchmark/gpu.py", "--json", str(report)]
    subprocess.run([*command, "--shape", "tiny", "--parts", *parts], cwd=ROOT, check=True)
    found = json.loads(report.read_text())["parts"]
    assert list(found) == parts
    assert not any("failed" in part for part in found.values())
    (dense,) = found["dense"]["rows"]
    assert dense["ratio"] == pytest.approx(dense["ours_ms"] / dense["megatron_ms"])
    rows = found["inference"]["rows"]
    assert {row["granularity"] for row in rows} == {"attn_token", "block_token", "block_sequence"}
    assert all(row["capacity"] == pytest.approx(0.5) for row in rows)


@pytest.mark.slow
def test_trainings_and_memory(tmp_path):
    report = tmp_path / "gpu.json"
    options = ["--shape", "tiny", "--training-layers", "4", "--folder", str(tmp_path)]
    parts = ["training", "memory"]
    benchmark_gpu.main(["--json", str(report), *options, "--parts", *parts])
    found = json.loads(report.read_text())["parts"]
    for name in parts:
        assert [row["granularity"] for row in found[name]["rows"]] == ["attn_token", "block_token"]
        assert not any("failed" in row for row in (found[name], *found[name]["rows"]))


def test_the_hosts_part_of_decode_steps(tmp_path, monkeypatch):
    recorded = []
    record = decode_host.LeftOut._record

    def count(self, *args):
        recorded.append(len(self.layers))
        return record(self, *args)

    monkeypatch.setattr(decode_host.LeftOut, "_record", count)
    for name, value in (("LAYERS", 4), ("WARM_UP", 1), ("ROUNDS", 2)):
        monkeypatch.setattr(decode_host, name, value)
    report = tmp_path / "gpu.json"
    benchmark_gpu.main(["--json", str(report), "--shape", "tiny", "--parts", "host"])
    rows = json.loads(report.read_text())["parts"]["host"]["rows"]
    assert [row["granularity"] for row in rows] == list(decode_host.GRANULARITIES)
    assert all(0 < row["least_us_per_layer"] <= row["us_per_layer"] for row in rows)
    # Once: the first layer's queries and attention, and what follows; and of two routed layers,
    # where there are any, what follows them, of tokens the attention before it, too.
    assert recorded == [4] * (2 + 6 + 6 + 4)


def test_attention_in_three_ways(tmp_path, monkeypatch):
    for name, value in (("TIMES", 2), ("ROUNDS", 2)):
        monkeypatch.setattr(decode_attention, name, value)
    report = tmp_path / "gpu.json"
    benchmark_gpu.main(["--json", str(report), "--shape", "tiny", "--parts", "attention"])
    rows = json.loads(report.read_text())["parts"]["attention"]["rows"]
    assert [(row["batch"], row["context"], row["places"]) for row in rows] == [
        (1, 16, 512), (2, 16, 512)
    ]  # fmt: skip
    for row in rows:
        assert row["apart"] < 1e-5
        assert all(row[f"{way}_us"] > 0 for way in ("alone", "masked", "in_parts"))


def test_parts_share_the_time(monkeypatch):
    """In proportion; what one does not take, or takes too much, is for the others to share."""
    now, given = [0.0], {}
    taken = {"layer": 10, "dense": 250, "inference": 400}

    def part(name):
        def run(asked, until):
            given[name] = until - now[0]
            now[0] += taken[name]
            yield {"row": 1}

        return run

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "PARTS", {name: part(name) for name in taken} | {"host": None})
    monkeypatch.setattr(gpu, "SHARES", {"layer": 1, "dense": 1, "inference": 2, "host": 1})
    saved = []
    asked = gpu.Asked("tiny", "tiny", 1, (), 1, 1, 500, None)
    report = gpu.measure(asked, [*taken, "host"], lambda report: saved.append(len(report["parts"])))
    assert given == {"layer": 100, "dense": 490 / 4, "inference": 160}
    assert report["parts"]["host"] == {"left_out": "no time was left"}
    assert saved == [1, 1, 2, 2, 3, 3, 4]


def test_every_cell_that_there_is_no_time_for_is_said(tmp_path):
    asked = gpu.Asked("tiny", "tiny", 128, ((1, 16), (2, 16)), 2, 1, 1, tmp_path)
    rows = [*gpu.inference(asked, 0), *gpu.trainings(asked, 0)]
    assert [(row["granularity"], row.get("batch")) for row in rows] == [
        ("attn_token", 1), ("attn_token", 2), ("block_token", 1), ("block_token", 2),
        ("block_sequence", 2), ("attn_token", None), ("block_token", None),
    ]  # fmt: skip
    assert all(row["left_out"] == "no time was left" for row in rows)


def test_what_there_is_no_time_for_is_said(tmp_path):
    report = tmp_path / "gpu.json"
    benchmark_gpu.main(
        ["--json", str(report), "--shape", "tiny", "--parts", "memory", "--seconds", "1e-9"]
    )
    assert json.loads(report.read_text())["parts"]["memory"] == {"left_out": "no time was left"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "dense", "dense"], "names one twice"),
        (["--parts", "dense", "--memory-gb", "8"], "--memory-gb 8.0: would be ignored"),
        (["--parts", "dense", "--training-layers", "4"], "--training-layers 4: would be ignored"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        benchmark_gpu.main(["--json", str(tmp_path / "gpu.json"), *options])
    assert message in capsys.readouterr().err
