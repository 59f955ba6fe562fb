"""``launch/quickstart.sh --lora`` of a tiny model: adapters with routers, and alone beside them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_mod.config import cli
from megatron_mod.evaluation.perplexity import read_rows
from megatron_mod.report.quickstart import build_report
from tests.helpers.commands import run, save_tiny

HELD_OUT = 8


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """What it printed, and where it put everything."""
    folder = tmp_path_factory.mktemp("quickstart")
    printed = run(
        sys.executable, "launch/quickstart.py", "--hf-path", save_tiny(folder / "hf"), "--lora",
        "--steps", 3, "--held-out", HELD_OUT, "--out", folder / "out",
    )  # fmt: skip
    return printed, folder / "out"


def test_both_trainings_have_the_same_adapters(quickstart):
    _, out = quickstart
    both, alone = (
        cli.parse(["--config", str(out / name / "config.yaml")]) for name in ("run", "adapted")
    )
    assert (both.train.trainable, alone.train.trainable) == ("routers+lora", "lora")
    assert both.lora.rank == alone.lora.rank
    assert both.lora.layers == alone.lora.layers == both.router.layers
    assert alone.router.layers == []
    assert both.lora.lr == alone.optimizer.lr
    assert both.train.steps == alone.train.steps


def test_what_the_adapters_alone_are_worth_is_hugging_faces_own(quickstart, tmp_path):
    printed, out = quickstart
    report = json.loads((out / "report.json").read_text())
    words = ("--load", out / "adapted", "--save", tmp_path / "adapted")
    run(sys.executable, "tools/convert_megatron_to_hf.py", *words)
    found = perplexity(tmp_path / "adapted", out)
    quality = report["quality"]
    assert quality["adapted_perplexity"] == pytest.approx(found, rel=1e-4)
    assert quality["dense_perplexity"] == pytest.approx(perplexity(report["model"], out), rel=1e-4)
    assert quality["adapted_perplexity"] != quality["dense_perplexity"]
    assert f"adapters alone  perplexity {found:.2f} (" in printed
    assert max(report["parity"].values()) <= 2e-5
    assert report["capacity"]["target"] == 0.5


def test_what_has_routers_is_not_adapters_alone(quickstart):
    inputs = dict.fromkeys(("hf_path", "export", "parity", "ranking", "held_out"), "unread")
    with pytest.raises(ValueError, match=r"--adapted .*/run: has routers; give a run of adapters"):
        build_report(**inputs, run="unread", adapted=quickstart[1] / "run", max_length=64)


def perplexity(hf: Path, out: Path) -> float:
    """A dense Hugging Face folder's on the held-out text, read plainly."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(hf), AutoTokenizer.from_pretrained(hf)
    nats = labels = 0
    length = min(256, model.config.max_position_embeddings)
    for row in read_rows(out / "data" / "held_out.jsonl", tokenizer, max_length=length):
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0]
        asked = torch.tensor(row.labels)
        nats += float(torch.nn.functional.cross_entropy(logits, asked, reduction="sum"))
        labels += row.num_labels
    return math.exp(nats / labels)
