"""The quality benchmark, on a tiny model."""

from __future__ import annotations

import json
import math

import pytest

from megatron_mod.benchmark import quality_models
from megatron_mod.benchmark.quality import at_work, summarise
from megatron_mod.commands.benchmark_quality import QualityBenchmark
from megatron_mod.config.quality_budget import Budget, trainings
from tests.helpers.runs import Trainer
from tests.helpers.tools import run_tool

LORA = ("dense+lora", "removed+lora", "ours+lora")


def test_settings_of_adapters_nobody_has(tmp_path, single_process, monkeypatch, capsys):
    trainer = Trainer(tmp_path)
    words = ["--load", trainer.base, "--train", trainer.text, "--texts", trainer.text]
    words += ["--out", tmp_path / "out", "--lora.lr", 0.002]
    assert run_tool(monkeypatch, "benchmark_quality", *words) != 0
    assert "--lora.lr: would be ignored, because --lora is unset" in capsys.readouterr().err


def test_trains_measures_and_goes_on(tmp_path, single_process, monkeypatch):
    trainer = Trainer(tmp_path)
    text = tmp_path / "other.txt"
    text.write_text("abcd " * 100)
    words = [
        "--load", trainer.base, "--train", trainer.text, "--texts", trainer.text, text,
        "--budgets", "attn_token:0.5", "attn_token+mlp_token:work=0.85,0.95",
        "--out", tmp_path / "out", "--seeds", 0, "--layers", 2,
        "--samples", 8, "--max_length", 32, "--steps", 2,
        "--router.stand_in_tokens", 64, "--lora", 2, "--lora.lr", 0.002,
    ]  # fmt: skip
    told = []
    serve = quality_models.serve
    monkeypatch.setattr(quality_models, "serve", lambda *to: (told.append(to[-1]), serve(*to)))
    assert run_tool(monkeypatch, "benchmark_quality", *words) == 0
    assert told == [0.85, 0.95] * 2  # routers, and those with adapters
    first = (tmp_path / "out" / "quality.json").read_text()
    found = json.loads(first)
    assert set(found["dense"]) == {"train", "other"}
    ours = [row for row in found["table"] if row["recipe"] == "ours"]
    assert [row["seeds"] for row in ours] == [1] * 6
    served = [row["target_work"] for row in ours if row["trained_range"] == [0.85, 0.95]]
    assert served == [0.85, 0.85, 0.95, 0.95]
    for row in ours:
        if row["target_work"] is None:
            assert row["capacity"] == pytest.approx(0.5, abs=0.1)
            assert row["work"] < 1
        else:
            assert row["target_capacity"] is None
            assert row["work"] == pytest.approx(row["target_work"], abs=0.05)
        assert row["perplexity_standard_error"] is None  # of one seed
    adapted = {recipe: [r for r in found["table"] if r["recipe"] == recipe] for recipe in LORA}
    assert [len(rows) for rows in adapted.values()] == [6] * 3
    for dense, removed, routed in zip(*adapted.values(), strict=True):
        assert dense["work"] == pytest.approx(1, abs=0.01)
        assert removed["work"] == pytest.approx(routed["work"], abs=0.08)  # of the nearest removal
        assert dense["perplexity"] != found["dense"][dense["text"]]  # they were trained
    published = [row for row in found["table"] if row["recipe"] == "published"]
    assert {row["granularity"] for row in published} == {"attn_token"}
    assert next(one["removed"] for one in found["static"] if not one["stand_ins"]) == []
    parts = [one["removed"] for one in found["static"] if one["target"] == "attn+mlp"]
    assert {name.split(".")[1] for removed in parts for name in removed} <= {"attn", "mlp"}
    assert (tmp_path / "out" / "quality.png").stat().st_size > 1000
    before = (tmp_path / "out" / "measured.json").stat().st_mtime_ns
    assert run_tool(monkeypatch, "benchmark_quality", *words) == 0
    assert (tmp_path / "out" / "measured.json").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "quality.json").read_text() == first


def test_a_training_for_all_capacities_and_one_for_each_budget_of_work():
    texts = ["mlp_token:0.7", "mlp_token:work=0.9", "mlp_token:0.5", "mlp_token:work=0.8,0.6"]
    twice = ["mlp_token:0.5", "mlp_token:work=0.9", "mlp_token:work=0.6,0.7,0.8"]
    found = trainings(list(map(Budget.parse, [*texts, *twice])))
    assert [one.shares for one in found] == [(0.5, 0.7), (0.9,), (0.6, 0.7, 0.8)]
    assert [one.trained_for for one in found] == [0.5, 0.9, [0.6, 0.8]]
    assert [one.label for one in found] == ["0.5", "work=0.9", "work=0.6-0.8"]


def _removal(work: float, perplexity: float) -> dict:
    return {"target": "attn", "stand_ins": False, "texts": {"t": locals()}}


def test_removal_at_equal_work_lies_between_two_removals():
    static = [_removal(1.0, 8.0), _removal(0.9, 16.0), _removal(0.8, 64.0)]
    assert at_work(static, "attn", "t", 0.95, stand_ins=False) == pytest.approx(math.sqrt(128))
    assert at_work(static, "attn", "t", 0.8, stand_ins=False) == pytest.approx(64.0)
    assert at_work(static, "attn", "t", 0.7, stand_ins=False) is None
    assert at_work(static, "mlp", "t", 0.9, stand_ins=False) is None


def test_seeds_are_averaged_in_nats():
    def point(perplexity: float) -> dict:
        measured = {"perplexity": perplexity, "capacity": 0.5, "work": 0.9}
        return {
            "recipe": "ours", "granularity": "attn_token", "capacity": 0.5, "texts": {"t": measured}
        }  # fmt: skip

    (row,) = summarise([point(8.0), point(32.0)], [], {"t": 4.0})
    assert row["perplexity"] == pytest.approx(16.0)
    assert row["perplexity_standard_error"] == pytest.approx(16.0 * math.log(2))
    assert row["over_dense"] == pytest.approx(4.0)


@pytest.mark.parametrize(
    "budget",
    [
        "attn_token", "attn_token:0", "attn_token:two", "attn:0.5", "attn_token:work=2",
        "attn_token:0.5,0.6", "attn_token:work=0.5,2", "attn_token:work=0.5,0.5",
    ],
)  # fmt: skip
def test_a_budget_that_is_none_is_named(budget, tmp_path):
    with pytest.raises(ValueError, match="attn"):
        QualityBenchmark(load="a", train="b", texts=("c",), out="d", budgets=(budget,))
