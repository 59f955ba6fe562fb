"""The quickstart as a whole: what it prints and leaves, held to the formula on the original model.

Of the finished one in the folder ``$MEGATRON_MOD_QUICKSTART``, with what it printed beside it
(``FOLDER.txt``), as CI has it of the real model; without, as a slow test, of a tiny model.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_mod.config import cli
from megatron_mod.evaluation.perplexity import read_rows
from megatron_mod.evaluation.work import Work
from megatron_mod.routing.scheme import Place
from tests.helpers import formula
from tests.helpers.commands import read_metrics, run, save_tiny

GIVEN = os.environ.get("MEGATRON_MOD_QUICKSTART")
HELD_OUT = 12  # samples, of either
SCORED = 256  # tokens of each, at most
pytestmark = [] if GIVEN else [pytest.mark.slow]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """What ``launch/quickstart.py`` printed, and where it put everything."""
    if GIVEN:
        return Path(f"{GIVEN}.txt").read_text(), Path(GIVEN)
    folder = tmp_path_factory.mktemp("quickstart")
    printed = run(
        sys.executable, "launch/quickstart.py", "--hf-path", save_tiny(folder / "hf"),
        "--steps", 3, "--held-out", HELD_OUT, "--out", folder / "out",
    )  # fmt: skip
    return printed, folder / "out"


@pytest.fixture(scope="module")
def config(quickstart):
    """Of the training."""
    return cli.parse(["--config", str(quickstart[1] / "run" / "config.yaml")])


SHAPE = {
    "model": str, "device": str, "world_size": int, "export_path": str, "static_method": str,
    "parallel": {"tensor": int, "pipeline": int, "data": int},
    "train": {
        "steps": int, "tokens": int, "tokens_per_second": float, "loss_first": float,
        "loss_last": float, "trainable_parameters": int, "frozen_parameters_changed": int,
    },
    "parity": {"hf_to_megatron_max_rel": float, "megatron_to_hf_max_rel": float},
    "quality": {
        "dense_perplexity": float, "routed_perplexity": float, "static_perplexity": float,
        "static_method": str, "static_removed_layers": list, "static_capacity": float,
        "static_counted_speedup": float, "work": {"routed": float, "static": float},
        "eval_tokens": int, "pooling": str, "published_perplexity": float,
        "published_capacity": float, "published_work": float,
    },
    "capacity": {"target": float, "mean": float, "per_layer": dict},
    "speed": {
        "context_tokens": int, "capacity": float, "counted": float,
        **{
            phase: {
                "dense_s": float, "routed_s": float, "speedup": float, "speedup_low": float,
                "speedup_high": float, "confidence": float, "pairs": int, "is_measurable": bool,
            }
            for phase in ("prefill", "decode")
        },
    },
}  # fmt: skip


def check_shape(value, shape):
    if not isinstance(shape, dict):
        assert isinstance(value, shape), (value, shape)
        return
    for key, inner in shape.items():
        assert key in value, key
        check_shape(value[key], inner)


def test_quickstart_report(quickstart, config, tmp_path):
    printed, out = quickstart
    report = json.loads((out / "report.json").read_text())
    exported = json.loads((out / "export" / "config.json").read_text())
    layers = exported["routing"]["layers"]
    check_shape(report, SHAPE)
    assert report["parallel"] == {"tensor": 1, "pipeline": 2, "data": 1}
    assert report["train"]["steps"] == config.train.steps
    assert len((out / "data" / "held_out.jsonl").read_text().splitlines()) == HELD_OUT
    parameters = len(layers) * (exported["hidden_size"] + 1)  # with biases
    assert report["train"]["trainable_parameters"] == parameters
    assert report["train"]["frozen_parameters_changed"] == 0
    assert max(report["parity"].values()) <= 2e-5
    assert list(report["capacity"]["per_layer"]) == [str(layer) for layer in layers]
    for phase in ("prefill", "decode"):
        timing = report["speed"][phase]
        assert timing["speedup"] == pytest.approx(timing["dense_s"] / timing["routed_s"])
        told = not timing["speedup_low"] <= 1 <= timing["speedup_high"]
        assert timing["is_measurable"] == told
    batches = [report["speed"][phase]["batch"] for phase in ("prefill", "decode")]
    assert batches == [6, 1], "the six longer samples, and a question"
    assert "x counted)" in printed
    assert 0.7 < report["speed"]["counted"] < 3, "all rows of a batch on either side"
    check_static(report, out, layers)
    check_published(report, out, tmp_path / "published")
    removed = len(report["quality"]["static_removed_layers"])
    assert f"best static removal (greedy, {removed} layers) " in printed
    steps = config.train.steps
    for word in ("capacity", "perplexity", "prefill", "decode", f"step {steps}/{steps}"):
        assert word in printed
    assert f"Done: {steps} steps; the routers are in {out / 'run'}." in printed
    export = f"  python tools/convert_megatron_to_hf.py --load {out / 'run'} --save "
    assert f"{export}{out / 'run_export'}\n" in printed
    evaluate = f"  python tools/evaluate.py --load {out / 'run_export'} --perplexity "
    assert f"{evaluate}{out / 'data' / 'validation.jsonl'}\n" in printed


def check_static(report: dict, out: Path, layers: list[int]) -> None:
    """Removal that is nearest to the routed work, measured on the untouched original."""
    quality, steps = report["quality"], read_metrics(out / "run")
    removed = quality["static_removed_layers"]
    assert report["static_method"] == quality["static_method"] == "greedy"
    assert quality["static_capacity"] == pytest.approx(1 - len(removed) / len(layers))
    assert quality["work"]["static"] == pytest.approx(1 / quality["static_counted_speedup"])
    assert report["train"]["loss_first"] == steps[0]["task_loss"]
    assert report["train"]["loss_last"] == steps[-1]["task_loss"]
    original = Path(report["model"])
    dense, tokenizer = formula.load_dense(original), AutoTokenizer.from_pretrained(original)
    rows = read_rows(out / "data" / "held_out.jsonl", tokenizer, max_length=SCORED)
    thresholds = [1.0 if layer in removed else 0.0 for layer in layers]
    work = Work.of(json.loads((out / "export" / "config.json").read_text())).at(thresholds)
    tensors = load_file(out / "export" / "model.safetensors")
    more = {
        layer: {
            name: tensors[f"model.layers.{layer}.{name}"]
            for name in ("stand_in.down.weight", "stand_in.up.weight", "stand_in.up.bias")
        }
        for layer in layers
    }
    borders = {layer: math.inf if layer in removed else -math.inf for layer in layers}
    routers = dict.fromkeys(layers, torch.zeros(1, dense.config.hidden_size))
    nats = labels = flops = whole = 0
    for row in rows:
        with torch.no_grad():
            logits, made, _ = formula.forward(
                dense, row.ids, routers, borders=borders, granularity="block_token", more=more
            )
        asked = torch.tensor(row.labels)
        nats += float(torch.nn.functional.cross_entropy(logits, asked, reduction="sum"))
        labels += row.num_labels
        flops += work.prefill(len(row.ids), {Place(n, "block"): m.bool() for n, m in made.items()})
        whole += work.prefill(len(row.ids), {})
    assert quality["static_perplexity"] == pytest.approx(math.exp(nats / labels), rel=1e-4)
    assert quality["work"]["static"] == pytest.approx(flops / whole)
    spared = (1 - quality["work"]["static"]) / max(len(removed), 1)
    if 0 < len(removed) < len(layers):
        assert abs(quality["work"]["routed"] - quality["work"]["static"]) <= spared / 2
    kept = report["speed"]["capacity"]
    assert (report["speed"]["counted"] > 1) == (kept < 1)


def check_published(report: dict, out: Path, hf: Path) -> None:
    """The other run's perplexity and work are those of its own decisions."""
    run(
        sys.executable, "tools/convert_megatron_to_hf.py",
        *("--load", out / "published", "--save", hf),
    )  # fmt: skip
    config = json.loads((hf / "config.json").read_text())
    tensors = load_file(hf / "model.safetensors")
    layers = config["routing"]["layers"]
    routers = {layer: tensors[f"model.layers.{layer}.router.weight"] for layer in layers}
    original, quality = Path(report["model"]), report["quality"]
    dense, tokenizer = formula.load_dense(original), AutoTokenizer.from_pretrained(original)
    work = Work.of(config)
    nats = labels = kept = units = flops = whole = 0
    for row in read_rows(out / "data" / "held_out.jsonl", tokenizer, max_length=SCORED):
        with torch.no_grad():
            logits, made, _ = formula.forward(dense, row.ids, routers, granularity="block_token")
        asked = torch.tensor(row.labels)
        nats += float(torch.nn.functional.cross_entropy(logits, asked, reduction="sum"))
        labels += row.num_labels
        kept += sum(float(mask.sum()) for mask in made.values())
        units += len(made) * len(row.ids)
        flops += work.prefill(len(row.ids), {Place(n, "block"): m.bool() for n, m in made.items()})
        whole += work.prefill(len(row.ids), {})
    assert 0 < kept < units, "it keeps everything or nothing, whose work any fault may have"
    assert quality["published_capacity"] == pytest.approx(kept / units, abs=1e-3)
    assert quality["published_perplexity"] == pytest.approx(math.exp(nats / labels), rel=5e-3)
    assert quality["published_work"] == pytest.approx(flops / whole, rel=1e-3)


def test_a_run_leaves_its_configuration_metrics_and_checkpoint(quickstart, config):
    run_folder, last = quickstart[1] / "run", config.train.steps
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, last + 1))
    assert {"loss", "capacity", "learning_rate", "grad_norm", "tokens_per_second"} <= set(steps[0])
    assert [line["step"] for line in lines if "validation_loss" in line] == [last]
    assert (run_folder / "latest").read_text().strip() == f"step_{last:08}"
    assert len(steps[0]["capacity"]) == config.router.layers["deepest"]


def test_export_loads_and_generates(quickstart):
    model = AutoModelForCausalLM.from_pretrained(quickstart[1] / "export", trust_remote_code=True)
    made = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, eos_token_id=None)
    assert made.shape == (1, 7)
