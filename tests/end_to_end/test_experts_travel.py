"""Routers on a mixture's experts, and on its whole layers: trained, exported, compared, run."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_mod.conversion import convert
from tests.helpers import runs, tiny
from tests.helpers.exported import load
from tests.helpers.tools import run_tool

pytestmark = pytest.mark.usefixtures("single_process")

CASES = {
    "mixtral": {**runs.EXPERTS, "router__renormalize": "true"},
    "qwen3_moe": runs.EXPERTS,
    "olmoe": {"router__granularity": "block_token", "router__pooling": None},
}


@pytest.mark.parametrize("kind", CASES)
def test_what_was_trained_is_what_is_exported(kind, tmp_path, monkeypatch):
    changes = {"max_position_embeddings": 2048, **tiny.MIXTURES[kind][1]}
    trainer = runs.Trainer(tmp_path, kind=kind, **changes)
    run, export, out = tmp_path / "run", tmp_path / "export", tmp_path / "out.json"
    trainer.train(run, **{**CASES[kind], "train__steps": 2, "router__capacity": 0.5})
    convert.megatron_to_hf(run, export)
    asked = ("--load", run, "--hf-path", export, "--json", out)
    assert run_tool(monkeypatch, "compare_logits.py", *asked) == 0
    (figures,) = json.loads(out.read_text())
    assert figures["max_rel"] < 2e-5
    model = load(export)
    model.generate(torch.tensor([[65, 66, 67]]), max_new_tokens=4, do_sample=False)
    report = model.routing_report()
    per_token = 2 if "expert" in report["granularity"] else 1
    assert all(entry["units"] == 6 * per_token for entry in report["layers"].values())
