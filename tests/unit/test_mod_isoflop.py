"""The benchmark at equal training FLOPs, on tiny models."""

from __future__ import annotations

import json

import pytest

from megatron_mod.benchmark import isoflop_text
from megatron_mod.config.model_size import ModelSize
from tests.helpers.tools import run_tool

KINDS = [
    ("dense", 1.0), ("mod", 0.125), ("mod", 0.5), ("random", 0.125), ("random", 0.5),
    ("static", 0.0),
]  # fmt: skip
KEYS = {
    "kind", "capacity", "parameters", "train_flops", "forward_flops", "loss_top_k", "loss_causal",
    "agreement", "step_s", "size", "seed", "steps", "kept",
}  # fmt: skip
EXPERTS = [
    ("dense", 1.0), ("moe", 1.0), ("mode_staged", 0.125), ("mode_staged", 0.5),
    ("mode_integrated", 0.5),
]  # fmt: skip


TEXT = " ".join(f"Number {n} is {n * n % 97} and {'xyz' * (n % 5)}." for n in range(99))
WORDS = [
    "--sizes", "32x2", "--seeds", 0, "--length", 32, "--batch", 2, "--vocabulary", 300,
    "--budget", 3e7,
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory, single_process):
    """A folder and what the benchmark, called again, has written there; the budget is of two steps
    of the dense model."""
    out = tmp_path_factory.mktemp("isoflop") / "out"
    words = ["--out", out, *WORDS]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(isoflop_text, "python_text", lambda: TEXT)  # which takes seconds
        assert run_tool(monkeypatch, "benchmark_mod_isoflop", *words) == 0
        whole = (out / "isoflop.json").read_text()
        before = (out / "measured.json").stat().st_mtime_ns
        assert run_tool(monkeypatch, "benchmark_mod_isoflop", *words) == 0
        assert (out / "measured.json").stat().st_mtime_ns == before
        assert (out / "isoflop.json").read_text() == whole
        other = ["--text", out / "validation.txt"]
        assert run_tool(monkeypatch, "benchmark_mod_isoflop", *words, *other) == 2
    return out, json.loads(whole)


def test_every_model_is_trained_measured_once_and_dropped(found):
    out, whole = found
    assert {run.name.partition("_")[0] for run in out.glob("runs/*")} == {"dense", "mod"}
    assert (out / "isoflop.png").stat().st_size > 1000
    models = whole["models"]
    assert [(one["kind"], one["capacity"]) for one in models] == KINDS
    for model in models:
        assert model.keys() == KEYS
        assert model["loss_top_k"] == pytest.approx(5.7, abs=0.2)  # of 300 tokens
        assert (model["loss_causal"] is None) == (model["kind"] == "random")
        assert (model["agreement"] is None) == (model["kind"] != "mod")
        half_a_step = model["train_flops"] / model["steps"] / 2
        assert model["train_flops"] == pytest.approx(3e7, abs=half_a_step)
        assert model["step_s"] > 0
    rows = whole["sampling"]
    assert [(row["kind"], row["capacity"]) for row in rows] == KINDS[:3]
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_what_is_counted_follows_k(found):
    """Of a dense model three times a forward pass is a step's; of k tokens, k attend to each other
    and go through an MLP, and a router and a predictor see all."""
    by_kind = {(one["kind"], one["capacity"]): one for one in found[1]["models"]}
    dense, static = by_kind["dense", 1.0], by_kind["static", 0.0]
    vocabulary, n, h = 300, 32, 32
    head = 2 * h * vocabulary * n
    layer = dense["forward_flops"] - static["forward_flops"]
    assert dense["forward_flops"] == 2 * layer + head
    ffn, pairs = 96, n * (n + 1) // 2
    assert layer == 2 * n * (4 * h * h + 3 * h * ffn) + 4 * h * pairs
    step = dense["train_flops"] / dense["steps"]
    assert step == 2 * 3 * (dense["forward_flops"] - head // n)  # labels are all but the first
    for capacity, k in ((0.125, 4), (0.5, 16)):
        routed = by_kind["random", capacity]["forward_flops"]
        kept = 2 * k * (4 * h * h + 3 * h * ffn) + 4 * h * k * (k + 1) // 2
        assert routed == static["forward_flops"] + kept + 2 * h * n
        assert by_kind["mod", capacity]["forward_flops"] > routed
    assert by_kind["mod", 0.5]["parameters"] > by_kind["random", 0.5]["parameters"]
    assert by_kind["random", 0.5]["parameters"] == dense["parameters"] + h


def test_sizes_are_refused_that_no_model_has():
    assert str(ModelSize.parse("96x6")) == "96x6"
    for text, said in (("96", "as 96x6"), ("90x6", "a multiple of 32"), ("96x5", "an even number")):
        with pytest.raises(ValueError, match=said):
            ModelSize.parse(text)


@pytest.mark.slow
def test_mixtures_of_depths_and_experts_beside_mixtures(single_process, tmp_path, monkeypatch):
    """A token's experts cost what an MLP does; of the routed layer's half is left."""
    monkeypatch.setattr(isoflop_text, "python_text", lambda: TEXT)
    words = ["--out", tmp_path / "out", *WORDS, "--models", *dict(EXPERTS)]
    assert run_tool(monkeypatch, "benchmark_mod_isoflop", *words) == 0
    whole = json.loads((tmp_path / "out" / "isoflop.json").read_text())
    models = {(one["kind"], one["capacity"]): one for one in whole["models"]}
    assert list(models) == EXPERTS
    n, h, ffn, gate = 32, 32, 96, 2 * 32 * 32 * 8
    dense, moe = (models[kind, 1.0]["forward_flops"] for kind in ("dense", "moe"))
    assert moe == dense + 2 * gate
    integrated = models["mode_integrated", 0.5]
    assert integrated["forward_flops"] == moe + gate - 2 * n * 3 * h * ffn // 2
    assert integrated["parameters"] == models["moe", 1.0]["parameters"] + 8 * h
    assert 0 < integrated["kept"] < 1
    assert models["mode_staged", 0.125]["kept"] == pytest.approx(0.125, abs=0.02)  # of whole tokens
    assert [(row["kind"], row["capacity"]) for row in whole["sampling"]] == EXPERTS
    assert run_tool(monkeypatch, "benchmark_mod_isoflop", *words[:14], "--models", "moe") == 2
