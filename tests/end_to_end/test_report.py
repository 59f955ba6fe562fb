"""The report of a training: what its page holds, against the run's own files and the formula."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_mod.conversion.convert import megatron_to_hf
from megatron_mod.conversion.routers import read_routers
from megatron_mod.conversion.source import open_base
from megatron_mod.parallel.topology import Topology
from megatron_mod.report import figures
from megatron_mod.report.measured import Measured, measure
from megatron_mod.report.page import draw, write_page
from megatron_mod.report.run import Run, read_run
from tests.helpers import experts, formula
from tests.helpers.runs import EXPERTS, Trainer

ROOT = Path(__file__).resolve().parents[2]
ONE = Topology(tensor=1, pipeline=1, data=1)
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def by_token(trainer):
    """A finished run with token routing and validation."""
    folder = trainer.folder / "token"
    trainer.train(
        folder, router__granularity="mlp_token", router__pooling=None, router__layers__deepest=3,
        data__validation=trainer.text, train__validation_interval=3,
    )  # fmt: skip
    return folder


def measured(folder: Path, **settings) -> tuple[Run, Measured]:
    run = read_run(folder)
    settings = {"data": None, "samples": 0, "capacities": (0.5,), "say": str, **settings}
    return run, measure(run, ONE, dtype="float32", batch_size=4, **settings)


def test_the_page_stands_alone_and_its_figures_lie_beside_it(by_token):
    run, found = measured(by_token)
    page = write_page(run, found)
    assert page == by_token / "report.html"
    html = page.read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    prefix = "data:image/png;base64,"
    assert links, "no figures"
    assert all(link.startswith(prefix) for link in links)
    inside = {base64.b64decode(link.removeprefix(prefix)) for link in links}
    beside = {path.stem: path.read_bytes() for path in (by_token / "report").iterdir()}
    assert set(beside) == {"loss", "capacity", "decisions", "scores", "quality"}
    assert inside == set(beside.values())
    assert all(content.startswith(PNG) for content in inside)
    assert "mlp_token on layers 0, 1, 2" in html
    assert "step 6 of 6" in html
    assert (by_token / "config.yaml").read_text().strip() in html
    assert f"{found.trained['perplexity']:.2f}" in html


def test_figures_show_the_runs_own_numbers(by_token):
    run, found = measured(by_token)
    lines = [json.loads(line) for line in (by_token / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    drawn = draw(run, found)
    (axes,) = drawn["loss"].axes
    shown = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert shown["task loss"] == [step["task_loss"] for step in steps]
    assert shown["validation"] == [r["validation_loss"] for r in lines if "validation_loss" in r]
    mean, by_layer, _ = drawn["capacity"].axes
    assert list(mean.lines[0].get_ydata()) == [step["capacity_mean"] for step in steps]
    mesh = by_layer.collections[0].get_array()
    assert mesh.T.tolist() == [step["capacity"] for step in steps]
    assert len(drawn["scores"].axes) == 3
    routed, static, *_ = drawn["quality"].axes[0].lines
    points = [*found.curve, found.trained]
    assert sorted(routed.get_ydata()) == sorted(point["perplexity"] for point in points)
    assert sorted(static.get_ydata()) == sorted(point["static_perplexity"] for point in points)


def test_decisions_are_those_of_the_formula(trainer, by_token):
    run, found = measured(by_token)
    export = trainer.folder / "export"
    megatron_to_hf(by_token, export)
    shares, skipped = decided(trainer, export, run)
    assert torch.allclose(found.decisions.shares, shares, atol=1e-6)
    mean = run.validations[-1]["validation_capacity_mean"]
    tokens = torch.tensor([document["tokens"] for document in found.documents])
    assert float((found.decisions.shares * tokens).sum() / (3 * tokens.sum())) == pytest.approx(
        mean
    )
    for token in found.tokens["most"] + found.tokens["least"]:
        assert token["skipped"] == pytest.approx(skipped[token["id"]], abs=1e-6)
    most, least = ([t["skipped"] for t in found.tokens[name]] for name in ("most", "least"))
    assert most == sorted(most, reverse=True)
    assert least == sorted(least)
    assert min(most) >= max(least)


def decided(trainer: Trainer, export: Path, run: Run) -> tuple[torch.Tensor, dict[int, float]]:
    """Kept shares by layer and document, and the skipped share of each token, in plain torch."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from megatron_mod.evaluation.perplexity import read_rows

    dense = formula.load_dense(trainer.hf)
    weights = load_file(export / "model.safetensors")
    routers = {layer: weights[f"model.layers.{layer}.router.weight"] for layer in (0, 1, 2)}
    tokenizer = AutoTokenizer.from_pretrained(trainer.hf)
    shares, seen = [], {}
    for row in read_rows(trainer.text, tokenizer, max_length=64):
        with torch.no_grad():
            _, masks, _ = formula.forward(dense, row.ids, routers, granularity="mlp_token")
        kept = torch.stack([masks[layer] for layer in (0, 1, 2)]).double()
        shares.append(kept.mean(1))
        for token, share in zip(row.ids, (1 - kept.mean(0)).tolist(), strict=True):
            seen.setdefault(token, []).append(share)
    return torch.stack(shares, 1), {token: sum(s) / len(s) for token, s in seen.items()}


def test_sequences_are_whole_and_have_no_tokens(trainer):
    folder = trainer.folder / "sequence"
    trainer.train(folder)
    run, found = measured(folder, samples=8)
    assert found.tokens is None
    assert found.pooling == "all"
    assert found.decisions.shares.shape == (2, 8)
    assert set(found.decisions.shares.unique().tolist()) <= {0.0, 1.0}
    html = write_page(run, found).read_text()
    assert "most skipped" not in html
    assert "decided on all of them" in html


def test_tokens_of_each_expert_are_those_of_the_formula(tmp_path, single_process, monkeypatch):
    from transformers import AutoTokenizer

    from megatron_mod.evaluation.perplexity import read_rows

    kind, changes = experts.FAMILIES["mixtral"]
    trainer = Trainer(tmp_path, kind=kind, **changes)
    trainer.write_distinct()
    folder = tmp_path / "run"
    trainer.train(folder, **EXPERTS, optimizer__average_fraction=0.0)
    run, found = measured(folder)
    write_page(run, found)
    shown = json.loads((folder / "report.json").read_text())["experts"]
    assert (folder / "report" / "experts.png").is_file()

    routing, added = read_routers(folder, open_base(trainer.base).arch)
    (place, other) = routing.places
    routers = {layer: own["router.weight"] for layer, own in added.items()}
    dense, sent = formula.load_dense(trainer.hf), []
    ask = experts.gate

    def gate(*args):
        weights, assigned = ask(*args)
        sent.append(assigned)
        return weights, assigned

    monkeypatch.setattr(experts, "gate", gate)
    wanted = {(e["layer"], e["expert"]): [0, 0, 0, 0] for e in shown}
    tokenizer = AutoTokenizer.from_pretrained(trainer.hf)
    for row in read_rows(trainer.text, tokenizer, max_length=64):
        for after in (0, 2):
            sent.clear()
            borders = [routing.logit_border(p) if after else -math.inf for p in routing.places]
            with torch.no_grad():
                _, masks, _ = formula.forward(
                    dense, row.ids, routers, granularity="expert_token", more=added,
                    borders=dict(zip(routing.places, borders, strict=True)),
                )  # fmt: skip
            # A routed layer's gate is asked what it sends, and once more by its mixture.
            for layer, assigned in zip((place.layer, other.layer), sent[::2], strict=True):
                kept = torch.zeros(assigned.shape).masked_scatter(assigned, masks[layer])
                for number in range(assigned.shape[1]):
                    wanted[layer, number][after] += int(assigned[:, number].sum())
                    wanted[layer, number][after + 1] += int(kept[:, number].sum())
    names = ("assigned_before", "executed_before", "assigned", "executed")
    assert {(e["layer"], e["expert"]): [e[name] for name in names] for e in shown} == wanted
    assert 0 < sum(e["executed"] for e in shown) < sum(e["assigned"] for e in shown)
    assert all(e["executed_before"] == e["assigned_before"] for e in shown)


def test_a_run_before_its_first_step_and_one_cut_short_have_a_page(trainer, by_token, tmp_path):
    trainer.train(tmp_path / "none", train__steps=0)
    html = write_page(read_run(tmp_path / "none"), None).read_text()
    assert "no step yet" in html
    assert "the model was not run" in html
    (tmp_path / "going").mkdir()
    (tmp_path / "going" / "config.yaml").write_text((by_token / "config.yaml").read_text())
    lines = (by_token / "metrics.jsonl").read_text().splitlines(keepends=True)
    cut = json.dumps({"step": 2, "skipped": "not finite", "samples": []}) + "\n" + lines[1][:20]
    (tmp_path / "going" / "metrics.jsonl").write_text(lines[0] + cut)
    run = read_run(tmp_path / "going")
    assert run.routing is None
    html = write_page(run, None).read_text()
    assert "step 1 of 6" in html
    assert "1 step(s) skipped (not finite): 2" in html
    assert [path.name for path in (tmp_path / "going" / "report").iterdir()] == ["loss.png"]


def test_text_on_the_page_is_text(by_token, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "<script>alert(1)</script>", "completion": "<b>"}\n' * 2)
    run, found = measured(by_token, data=str(data))
    html = write_page(run, found).read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert str(data) in html


def test_a_folder_that_is_no_run_is_refused(trainer):
    with pytest.raises(ValueError, match="holds no training run"):
        read_run(trainer.base)


def test_uneven_steps_have_their_own_widths():
    assert figures._edges([1, 2, 4]).tolist() == [0.5, 1.5, 3.0, 5.0]
    assert figures._edges([7]).tolist() == [6.5, 7.5]


def test_the_command(by_token):
    done = report(by_token, "--samples", 4, "--curve")
    assert done.returncode == 0, done.stderr
    assert f"Wrote {by_token / 'report.html'}" in done.stdout
    done = report(by_token, "--without-model", "--data", "x")
    assert done.returncode == 2
    assert "--data x: would be ignored" in done.stderr


def report(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools/report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)
