"""Converting, comparing, evaluating and calibrating routers that keep a number of tokens
exactly."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from megatron_mod.calibration import export_timing
from megatron_mod.conversion import convert
from megatron_mod.conversion.routers import write_step
from megatron_mod.conversion.source import open_base
from megatron_mod.evaluation.load import load_backend
from megatron_mod.evaluation.perplexity import read_rows
from megatron_mod.parallel.topology import Topology
from megatron_mod.report.measured import measure
from megatron_mod.report.page import write_page
from megatron_mod.report.run import read_run
from megatron_mod.routing.config import RoutingConfig
from tests.end_to_end.test_top_k import EXACT
from tests.helpers import exact, formula, tiny
from tests.helpers.runs import Trainer
from tests.helpers.tools import run_tool

pytestmark = pytest.mark.usefixtures("single_process")
ONE = Topology(tensor=1, pipeline=1, data=1)
CAPACITY = {0: 0.5, 2: 0.25}
TEXT = "What is two and two? Four, says everybody in Paris; and nobody there asks for more."


class Models:
    """A dense model, its base, and for a target and what decides causally a run's step and its
    export."""

    def __init__(self, folder) -> None:
        self.folder, self.text = folder, folder / "text.txt"
        self.text.write_text(TEXT)
        self.hf = tiny.save_llama(
            folder / "hf", vocab_size=tiny.VOCAB, max_position_embeddings=2048,
            num_key_value_heads=2,
        )  # fmt: skip
        tiny.save_tokenizer(self.hf)
        self.base = folder / "base"
        convert.hf_to_megatron(self.hf, self.base)
        self.routers = {}

    def run(self, target: str, causal: str | None = "predictor", **changes):
        """The step folder of a training that ended with these."""
        routers = exact.draw(target, causal, CAPACITY, bias=True)
        name = f"{target}_{causal}_{'_'.join(changes.values())}"
        if name not in self.routers:
            routing = RoutingConfig(layers=tuple(CAPACITY), **{**routers.routing(), **changes})
            where = {"base": str(self.base), "fingerprint": open_base(self.base).fingerprint()}
            write_step(self.folder / name, routing, routers.added, **where)
        self.routers[name] = routers
        return self.folder / name

    def export(self, run):
        folder = run.with_name(f"{run.name}_export")
        if not folder.exists():
            convert.megatron_to_hf(run, folder)
        return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, single_process):
    return Models(tmp_path_factory.mktemp("top_k_tools"))


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Runs a tool, and gives what it wrote as JSON, or its exit status if it did not end well."""

    def run(name: str, *arguments: object) -> dict | int:
        out = tmp_path / "out.json"
        status = run_tool(monkeypatch, name, *arguments, "--json", out)
        return status or json.loads(out.read_text())

    return run


def test_the_export_holds_what_was_trained(models):
    run = models.run("block")
    tensors = load_file(models.export(run) / "model.safetensors")
    for layer, own in models.routers[run.name].added.items():
        for name, tensor in own.items():
            assert torch.equal(tensors[f"model.layers.{layer}.{name}"], tensor)


@pytest.mark.parametrize(
    ("target", "causal"),
    [("block", "predictor"), ("attn", "auxiliary_loss"), ("mlp", "predictor")],
)
def test_run_and_export_are_one_model(models, tool, target, causal):
    run = models.run(target, causal)
    (compared,) = tool("compare_logits.py", "--load", run, "--hf-path", models.export(run))
    assert compared["max_rel"] < 2e-5


def by_formula(models, run, *, top_k: bool) -> tuple[float, dict[int, float], float]:
    """Perplexity of the text, each layer's capacity, and the share of decisions that both rules
    have in common."""
    dense, routers = formula.load_dense(models.hf), models.routers[run.name]
    tokenizer = AutoTokenizer.from_pretrained(models.hf)
    nats = labels = agreed = tokens = 0
    kept = dict.fromkeys(CAPACITY, 0)
    for row in read_rows(models.text, tokenizer, max_length=32):
        logits, made, other = exact.forward(dense, row.ids, routers, top_k=top_k)
        wanted = torch.tensor(row.labels)
        nats += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        labels, tokens = labels + row.num_labels, tokens + len(row.ids)
        for layer in kept:
            kept[layer] += int(made[layer].sum())
            agreed += int((made[layer] == other[layer]).sum())
    shares = {str(layer): count / tokens for layer, count in kept.items()}
    return math.exp(nats / labels), shares, agreed / tokens / len(kept)


@pytest.mark.parametrize("selection", ["causal", "top_k"])
def test_evaluation_reports_both_rules(models, tool, capsys, selection):
    run = models.run("block")
    of = {rule: by_formula(models, run, top_k=rule == "top_k") for rule in ("causal", "top_k")}
    assert of["causal"][0] != pytest.approx(of["top_k"][0], rel=1e-3)
    for load in (run, models.export(run)):
        asked = ("--load", load, "--perplexity", models.text, "--max-length", 32)
        asked += ("--selection", selection) if selection == "top_k" else ()
        report = tool("evaluate.py", *asked, "--batch-size", 2)
        assert report["selection"] == selection
        assert report["perplexity"] == report[f"perplexity_{selection}"]
        for rule in of:
            assert report[f"perplexity_{rule}"] == pytest.approx(of[rule][0], rel=1e-4)
        assert report["agreement"] == pytest.approx(of["top_k"][2], abs=1e-9)
        assert report["capacity"]["per_layer"] == pytest.approx(of[selection][1], abs=1e-9)
        shown = capsys.readouterr().out
        assert f"selection   {selection}: " in shown
        assert f"agreement   {report['agreement']:.4f} of the decisions" in shown


def test_a_selection_needs_routers_that_know_two(models, tool, capsys):
    for load, reason in (
        (models.hf, "this model has no routers"),
        (models.run("block", None, selection="threshold"), "router.selection = threshold"),
    ):
        asked = ("--perplexity", models.text, "--selection", "top_k")
        assert tool("evaluate.py", "--load", load, *asked) == 2
        said = capsys.readouterr().err
        assert "--selection top_k" in said
        assert reason in said


def test_what_generates_cannot_choose_among_later_tokens(models):
    pytest.importorskip("lm_eval", reason="needs the 'eval' extra")
    from megatron_mod.config.evaluation import Request
    from megatron_mod.evaluation.tasks import find_tasks, generating_tasks

    folder = models.folder / "tasks"
    folder.mkdir()
    for name, kind in (("writes", "generate_until"), ("scores", "loglikelihood")):
        (folder / f"{name}.yaml").write_text(f"task: {name}\noutput_type: {kind}\n")
    (folder / "both.yaml").write_text("group: both\ntask: [scores, writes]\n")
    settings = {"include_path": str(folder), "selection": "top_k"}
    load = str(models.export(models.run("block")))
    with pytest.raises(ValueError, match="--selection top_k: task 'writes' generates.*causal"):
        find_tasks(Request(load, tasks=("scores", "writes"), **settings))
    manager = find_tasks(Request(load, tasks=("scores",), **settings))
    assert generating_tasks(manager, "both") == ["writes"]
    backend = load_backend(load, ONE, dtype="float32", selection="top_k")
    with pytest.raises(ValueError, match="--selection top_k.*--selection causal"):
        backend.generate([[5, 6]], until=(), max_new_tokens=2)


def test_a_capacity_is_that_of_the_causal_rule(models, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(export_timing, "PROMPTS", 2)
    monkeypatch.setattr(export_timing, "NEW_TOKENS", 1)
    run, found = models.run("block"), []
    for load in (models.export(run), run):
        save = tmp_path / f"to_{load.name}"
        asked = ("--data", models.text, "--max-length", 32, "--save", save)
        status = run_tool(
            monkeypatch, "calibrate_router.py", "--load", load, *asked, "--capacity", 0.4,
            "--curve", 0.7,
        )  # fmt: skip
        assert status == 0, capsys.readouterr().err
        report = json.loads((save / "calibration.json").read_text())
        assert report["scope"] == "layer"
        chosen = report["chosen"]
        assert chosen["capacity_per_layer"] == pytest.approx([0.4, 0.4], abs=0.05)  # equal tokens
        assert chosen["static_perplexity"] is chosen["static_removed_layers"] is None
        assert chosen["counted_speedup"] > 1
        found.append(chosen["thresholds"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert "all kept" in capsys.readouterr().out
    budget = ("--max-perplexity-increase", "1%")
    asked = ("--load", models.export(run), "--data", models.text, *budget)
    assert run_tool(monkeypatch, "calibrate_router.py", *asked) == 2
    assert "--max-perplexity-increase 1%" in capsys.readouterr().err


def test_work_is_met_on_the_causal_rule(models, monkeypatch, tmp_path):
    monkeypatch.setattr(export_timing, "PROMPTS", 1)
    monkeypatch.setattr(export_timing, "NEW_TOKENS", 1)
    load, save = models.export(models.run("block")), tmp_path / "worked"
    status = run_tool(
        monkeypatch, "calibrate_router.py", "--load", load, "--data", models.text, "--work", 0.8,
        "--curve", "--save", save, "--max-length", 32,
    )  # fmt: skip
    assert status == 0
    assert json.loads((save / "calibration.json").read_text())["chosen"]["work"] <= 0.8


def test_lots_are_not_exported(models, monkeypatch, capsys, tmp_path):
    run = models.run("block", None, selection="random")
    for options in (("--load", run), ("--load", models.base, "--routers", run)):
        asked = (*options, "--save", tmp_path / "export")
        assert run_tool(monkeypatch, "convert_megatron_to_hf.py", *asked) == 2
        said = capsys.readouterr().err
        assert f"{run}: router.selection = random" in said
        assert "router.selection top_k" in said
        assert not (tmp_path / "export").exists()
    asked = ("--load", run, "--data", models.text, "--capacity", 0.5)
    assert run_tool(monkeypatch, "calibrate_router.py", *asked) == 2
    assert "router.selection = random" in capsys.readouterr().err


def test_the_published_format_knows_no_exact_number(models, monkeypatch, capsys, tmp_path):
    asked = ("--load", models.run("block"), "--save", tmp_path / "routers", "--routers-only")
    assert run_tool(monkeypatch, "convert_megatron_to_hf.py", *asked) == 2
    said = capsys.readouterr().err
    assert "--routers-only: router.selection = top_k" in said
    assert not (tmp_path / "routers").exists()


def test_a_run_with_adapters_is_exported_and_reported(models, tool, tmp_path):
    trainer = Trainer(tmp_path, max_position_embeddings=2048)
    trainer.train(
        tmp_path / "run", **EXACT, train__trainable="routers+lora", lora__rank=2,
        train__steps=3, data__validation=trainer.text, train__validation_interval=3,
    )  # fmt: skip
    export = models.export(tmp_path / "run")
    assert "predictor.out.weight" in " ".join(load_file(export / "model.safetensors"))
    (compared,) = tool("compare_logits.py", "--load", tmp_path / "run", "--hf-path", export)
    assert compared["max_rel"] < 2e-5
    run = read_run(tmp_path / "run")
    settings = {"data": None, "samples": 4, "capacities": (0.5,), "say": str, "dtype": "float32"}
    found = measure(run, ONE, batch_size=4, **settings)
    assert found.trained["static_perplexity"] is None
    page = write_page(run, found).read_text()
    assert "<td>all kept</td>" in page
    assert "static removal" not in page


@pytest.mark.parametrize("change", [{"causal": None}, {"predictor_size": None}])
def test_an_entry_that_does_not_fit_is_refused(models, tool, capsys, tmp_path, change):
    folder = shutil.copytree(models.export(models.run("block")), tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    config["routing"].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checksums.json").unlink()
    assert tool("evaluate.py", "--load", folder, "--perplexity", models.text) == 2
    assert f"routing.{next(iter(change))} = None" in capsys.readouterr().err
