"""``tools/benchmark/inference.py`` as a user runs it; what it says of time is not looked at."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_mod.commands import benchmark_inference
from tests.helpers import tiny
from tests.helpers.routed import save_export

PHASE = {"dense_s", "routed_s", "speedup", "ideal", "share", "saving_share"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model, an export of it, and the export of a larger one."""
    folder = tmp_path_factory.mktemp("pair")
    routers = {1: torch.randn(1, 32, generator=torch.Generator().manual_seed(2))}
    for name, channels in (("dense", 64), ("other", 96)):
        hf = tiny.save_llama(folder / name, vocab_size=tiny.VOCAB, intermediate_size=channels)
        tiny.save_tokenizer(hf)
        save_export(folder / f"{name}_export", hf, routers, granularity="block_token")
    return folder / "dense", folder / "dense_export", folder / "other_export"


def benchmark(*options: object) -> None:
    benchmark_inference.main([str(option) for option in options])


SMALL = ("--repetitions", 1, "--new-tokens", 2)


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_an_export_beside_its_original(folders, tmp_path, capsys, capacity):
    dense, export, _ = folders
    report = tmp_path / "report.json"
    options = () if capacity is None else ("--capacity", capacity)
    benchmark(
        "--dense", dense, "--routed", export, "--batches", 1, 2, "--contexts", 16, 30,
        "--json", report, *options, *SMALL,
    )  # fmt: skip
    found = json.loads(report.read_text())
    machine, rows = found["machine"], found["rows"]
    assert machine["torch"] == torch.__version__
    assert machine["dtype"] == "float32"
    assert machine["granularity"] == "block_token"
    assert set(machine) >= {"device", "threads", "transformers"}
    cells = [(1, 16), (1, 30), (2, 16), (2, 30)]
    assert [(row["batch"], row["context"]) for row in rows] == cells
    for row in rows:
        assert set(row) == {"batch", "context", "capacity", "prefill", "decode"}
        assert set(row["prefill"]) == PHASE
        assert set(row["decode"]) == PHASE | {"capacity"}
        if capacity:
            assert row["capacity"] == capacity
    printed = capsys.readouterr().out.splitlines()
    titles, rule, *lines = [line for line in printed if line.startswith("|")]
    assert len({line.count("|") for line in (titles, rule, *lines)}) == 1
    assert [tuple(map(int, line.split("|")[1:3])) for line in lines] == cells


def test_random_weights(tmp_path, capsys):
    report = tmp_path / "report.json"
    benchmark(
        "--shapes", "tiny", "--granularity", "attn_token", "--keys-values", "selected",
        "--capacity", 0.25, "--dtype", "bfloat16", "--batches", 2, "--contexts", 64,
        "--json", report, *SMALL,
    )  # fmt: skip
    found = json.loads(report.read_text())
    assert found["machine"]["dtype"] == "bfloat16"
    assert found["machine"]["keys_values"] == "selected"
    (row,) = found["rows"]
    assert row["capacity"] == 0.25
    assert math.isfinite(row["prefill"]["share"])
    assert row["prefill"]["ideal"] > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]


SHAPES = ("--shapes", "tiny", "--granularity", "attn_token", "--capacity", 0.5)
REFUSALS = {
    "neither": ((), ["--shapes None", "--dense HF_DIR"]),
    "both": ((*SHAPES, "--dense", "D", "--routed", "E"), ["--shapes tiny", "either"]),
    "dense_alone": (("--dense", "D"), ["--dense", "--routed DIR"]),
    "routed_alone": (("--routed", "E"), ["--routed", "--dense DIR"]),
    "no_granularity": (("--shapes", "tiny", "--capacity", 0.5), ["--granularity"]),
    "no_capacity": (("--shapes", "tiny", "--granularity", "mlp_token"), ["--capacity"]),
    "keys_of_mlp": (
        ("--shapes", "tiny", "--granularity", "mlp_token", "--capacity", 1, "--keys-values", "all"),
        ["--keys-values all", "mlp_token"],
    ),
    "granularity": (
        ("--dense", "D", "--routed", "E", "--granularity", "mlp_token"),
        ["--granularity mlp_token", "--shapes"],
    ),
    "keys_values": (
        ("--dense", "D", "--routed", "E", "--keys-values", "all"),
        ["--keys-values all", "--shapes"],
    ),
    "capacity": (
        ("--dense", "D", "--routed", "E", "--capacity", 1.5),
        ["--capacity 1.5", "0 to 1"],
    ),
    "batch": ((*SHAPES, "--batches", 2, 0), ["--batches 0", "at least 1"]),
    "new_tokens": ((*SHAPES, "--new-tokens", 0), ["--new-tokens 0", "at least 1"]),
    "positions": ((*SHAPES, "--contexts", 64, 250), ["--contexts 250", "256", "at most 232"]),
    "positions_of_folder": (
        ("--dense", "D", "--routed", "E", "--contexts", 120),
        ["--contexts 120", "128", "at most 104"],
    ),
    "no_folder": (
        ("--dense", "/nowhere/hf", "--routed", "E"),
        ["--dense /nowhere/hf: no such folder"],
    ),
    "swapped": (("--dense", "E", "--routed", "D", "--contexts", 16), ["--dense", "export"]),
    "other": (("--dense", "D", "--routed", "O", "--contexts", 16), ["--routed", "another shape"]),
    "json": ((*SHAPES, "--contexts", 64, "--json", "/nowhere/r.json"), ["/nowhere/r.json"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_makes_no_sense_is_refused(folders, capsys, case):
    options, said = REFUSALS[case]
    named = dict(zip("DEO", folders, strict=True))
    with pytest.raises(SystemExit) as ended:
        benchmark(*(named.get(option, option) for option in options))
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.out == ""
    for part in said:
        assert part in printed.err
