"""Mixture-of-Depths-and-Experts, staged and integrated, as a user trains, exports and reads it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_mod.config import cli
from megatron_mod.conversion.convert import megatron_to_hf
from tests.helpers import experts
from tests.helpers.runs import DEFAULT, EXACT, Trainer, metrics
from tests.helpers.tools import run_tool

LAYERS, NOOPS, EXPERTS = (1, 2), 3, 8
WEIGHT = 0.1
# Nothing said of routers that decide.
_OTHERS = ("stand_in_rank", "stand_in_tokens", "capacity", "layers__deepest")
UNSAID = dict.fromkeys([*DEFAULT, *(f"router__{name}" for name in _OTHERS)])
WHOLE = {"train__trainable": "all", "router__layers": list(LAYERS), "optimizer__lr": 0.003}
RUNS = {
    "staged": {**EXACT, **WHOLE, "router__layers__deepest": None},
    "integrated": {
        **UNSAID, **WHOLE, "router__granularity": "expert_token",
        "router__num_noop_experts": NOOPS,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    kind, changes = experts.FAMILIES["qwen3_moe"]
    changes = {**changes, "router_aux_loss_coef": WEIGHT}
    return Trainer(tmp_path_factory.mktemp("mode"), kind=kind, **changes)


@pytest.fixture(scope="module", params=RUNS)
def trained(request, trainer, tmp_path_factory):
    """Its name, a run and the run's export."""
    folder = tmp_path_factory.mktemp(request.param)
    validated = {"data__validation": trainer.text, "train__validation_interval": 3}
    trainer.train(folder / "run", **RUNS[request.param], **validated)
    megatron_to_hf(folder / "run", folder / "export")
    return request.param, folder / "run", folder / "export"


def load(export):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True).eval()


def test_a_run_says_how_even_its_gates_are(trained):
    name, run, _ = trained
    steps = [line for line in metrics(run) if "loss" in line]
    for line in steps:
        assert 0.9 < line["load_balancing_loss"] < EXPERTS
        assert line["loss"] == pytest.approx(line["task_loss"] + line["penalty"], rel=1e-6)
        assert 0 < line["penalty"] < WEIGHT * 4 * EXPERTS
    if name == "integrated":
        for line in steps:
            assert all(0.3 < share < 1 for share in line["capacity"])
            assert line["capacity_target"] == pytest.approx(EXPERTS / (EXPERTS + NOOPS))
            assert line["work"] < 1
        last = [line for line in metrics(run) if "validation_loss" in line][-1]
        assert 0 < last["validation_capacity_mean"] < 1


def test_run_and_export_are_one_model(trained, monkeypatch, tmp_path):
    _, run, export = trained
    asked = ("--load", run, "--hf-path", export, "--json", tmp_path / "found.json")
    assert run_tool(monkeypatch, "compare_logits.py", *asked) == 0
    (figures,) = json.loads((tmp_path / "found.json").read_text())
    assert figures["max_rel"] < 2e-5


def test_an_export_generates(trained):
    model = load(trained[2])
    found = model.generate(torch.arange(5, 17)[None], max_new_tokens=6, do_sample=False)
    assert found.shape == (1, 18)


def test_no_ops_are_in_the_gates_softmax(trained):
    """The export against plain torch on Hugging Face's own blocks, of its own tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name, run, export = trained
    if name == "staged":
        pytest.skip("has none")
    tensors = load_file(export / "model.safetensors")
    rows = {layer: tensors.pop(f"model.layers.{layer}.noop_gate.weight") for layer in LAYERS}
    (step,) = run.glob("step_*6")
    dense = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(step / "huggingface"), attn_implementation="eager"
    )
    state = dense.state_dict()
    if set(tensors) != set(state):  # Transformers 5 has a layer's experts in one
        tensors = fused(tensors, set(state))
    dense.load_state_dict(tensors)
    ids = list(range(7, 27))
    with torch.no_grad():
        wanted, sent = experts.with_noops(dense.eval(), ids, rows)
        ours = load(export)(torch.tensor([ids])).logits[0]
    assert (ours - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert any(sent[layer][:, EXPERTS:].any() for layer in LAYERS)


def fused(tensors: dict, names: set[str]) -> dict:
    """Tensors of experts as the model of Transformers 5 has them."""
    found = {name: tensor for name, tensor in tensors.items() if name in names}
    for layer in range(4):
        stem = f"model.layers.{layer}.mlp.experts"

        def of(what: str, stem: str = stem) -> list[torch.Tensor]:
            return [tensors[f"{stem}.{e}.{what}.weight"] for e in range(EXPERTS)]

        both = zip(of("gate_proj"), of("up_proj"), strict=True)
        found[f"{stem}.gate_up_proj"] = torch.stack([torch.cat(each) for each in both])
        found[f"{stem}.down_proj"] = torch.stack(of("down_proj"))
    return found


def test_an_evaluation_counts_what_no_ops_take(trained, trainer, monkeypatch, tmp_path):
    name, run, export = trained
    found = []
    for load in (run, export):
        asked = ("--load", load, "--perplexity", trainer.text, "--json", tmp_path / "found.json")
        assert run_tool(monkeypatch, "evaluate.py", *asked) == 0
        found.append(json.loads((tmp_path / "found.json").read_text()))
    megatron, hf = found
    assert hf["perplexity"] == pytest.approx(megatron["perplexity"], rel=1e-4)
    for layer, share in megatron["capacity"]["per_layer"].items():
        assert 0 < share < 1, name
        assert hf["capacity"]["per_layer"][layer] == pytest.approx(share, abs=1e-3), name


def test_no_ops_have_no_thresholds(trained, trainer, monkeypatch, tmp_path, capsys):
    name, run, _ = trained
    if name == "staged":
        pytest.skip("has some")
    asked = ("--load", run, "--data", trainer.text, "--capacity", 0.5, "--save", tmp_path / "t")
    assert run_tool(monkeypatch, "calibrate_router.py", *asked) == 2
    assert "router.num_noop_experts" in capsys.readouterr().err


def test_a_report_shows_what_each_expert_computed(trained, monkeypatch, tmp_path):
    name, run, _ = trained
    assert run_tool(monkeypatch, "report.py", run, "--samples", 4) == 0
    found = json.loads((run / "report.json").read_text())
    assert bool(found["experts"]) == (name == "integrated")
    for one in found["experts"]:
        computes = one["expert"] < EXPERTS
        assert one["executed"] == one["assigned"] * computes
    if name == "integrated":
        assert len(found["experts"]) == len(LAYERS) * (EXPERTS + NOOPS)
        assert sum(one["assigned"] for one in found["experts"] if one["expert"] >= EXPERTS) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router__granularity": "block_token"}, "routes no experts"),
        ({"train__trainable": "routers"}, "router.num_noop_experts = 3.*train.trainable = routers"),
        ({"router__capacity": 0.5}, "router.capacity = 0.5"),
        ({"router__selection": "top_k"}, "router.selection = top_k"),
        ({"router__threshold": 0.6}, "router.threshold = 0.6"),
        ({"router__bias": "true"}, "router.bias = True"),
        ({"router__renormalize": "true"}, "router.renormalize = True"),
        ({"router__work": 0.7}, "router.work = 0.7"),
        ({"router__stand_in": "linear"}, "router.stand_in = linear"),
        ({"router__num_noop_experts": 0}, "router.num_noop_experts = 0"),
    ],
)
def test_what_has_no_meaning_is_refused(trainer, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        cli.parse(trainer.arguments(tmp_path / "run", **{**RUNS["integrated"], **changes}))
