"""Adapters of PEFT's into a training, and a training's out again: merged, or apart for PEFT."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_mod.config.recipes import PUBLISHED
from megatron_mod.conversion.convert import export_routers, hf_to_megatron, megatron_to_hf
from megatron_mod.conversion.lora import read_step_adapters
from megatron_mod.conversion.peft import module_name, read_peft
from megatron_mod.conversion.source import open_source
from megatron_mod.evaluation.huggingface import load_model
from megatron_mod.evaluation.parity import compare
from megatron_mod.parallel.topology import ONE_RANK
from tests.helpers.adapters import CONFIG, SETTINGS, WEIGHTS, save_adapter
from tests.helpers.exported import load, relative
from tests.helpers.runs import Trainer
from tests.helpers.tools import run_tool

peft = pytest.importorskip("peft", reason="needs the 'test' extra")
pytestmark = pytest.mark.usefixtures("single_process")
IDS = torch.tensor([[70, 71, 72, 73, 74, 75]])
ALONE = {
    **{name.replace(".", "__"): None for name in PUBLISHED},
    **dict.fromkeys(("router__layers__deepest", "router__granularity", "router__pooling")),
    "router__capacity_loss_weight": None, "router__layers": "[]", "train__trainable": "lora",
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("trainer"), num_key_value_heads=2)


@pytest.fixture(scope="module")
def runs(trainer):
    """A training of routers and adapters, and one of adapters alone, with its averages."""
    both, alone = trainer.folder / "both", trainer.folder / "alone"
    settings = {"train__steps": 3, "lora__rank": 3, "lora__alpha": 5}
    trainer.train(both, **settings, train__trainable="routers+lora", lora__layers="[0, 2]")
    trainer.train(alone, **settings, **ALONE, lora__targets="[q_proj, linear_fc1]")
    return {"both": both, "alone": alone}


@pytest.fixture(scope="module")
def exports(runs):
    """Each run's exports: merged, and with its adapters apart."""
    found = {}
    for name, run in runs.items():
        for how in ("merge", "apart"):
            found[name, how] = run.with_name(f"{name}-{how}")
            megatron_to_hf(run, found[name, how], lora=how)
    return found


@pytest.fixture(scope="module")
def adapter(trainer):
    return save_adapter(trainer.folder / "adapter", trainer.hf, layers_to_transform=[1, 3])


def adapters_of(run):
    return read_step_adapters(open_source(run).step)


def with_peft(export):
    return peft.PeftModel.from_pretrained(load(export), export / "lora")


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("run", ["both", "alone"])
def test_merged_weights_are_the_sum(trainer, runs, exports, run, tmp_path):
    settings, adapters = adapters_of(runs[run])
    base = load_file(trainer.hf / "model.safetensors")
    for layer in settings.layers:
        for target in settings.targets:
            a, b = (adapters[layer][f"{target}.{matrix}"] for matrix in "ab")
            assert b.any(), "an adapter that adds nothing would show nothing"
            base[f"{module_name(layer, target)}.weight"] += settings.alpha / settings.rank * b @ a
    merged = load_file(exports[run, "merge"] / "model.safetensors")
    for name, weight in base.items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6)
    megatron_to_hf(runs[run], tmp_path / "half", dtype="bfloat16")  # added up before it is rounded
    for name, weight in load_file(tmp_path / "half" / "model.safetensors").items():
        if "router" not in name:
            assert torch.equal(weight, merged[name].bfloat16())


@pytest.mark.parametrize("run", ["both", "alone"])
def test_all_forms_of_a_run_are_one_model(trainer, runs, exports, run):
    merged, apart = exports[run, "merge"], exports[run, "apart"]
    for export in (merged, apart):
        difference, _ = compare(runs[run], export, ONE_RANK)
        assert difference < 1e-5
    expected = logits(load(merged))
    assert relative(logits(load_model(apart)), expected) < 1e-5
    assert relative(logits(with_peft(apart)), expected) < 1e-5
    assert relative(logits(load(apart)), expected) > 1e-2  # which lacks the adapters
    base, bare = (load_file(folder / "model.safetensors") for folder in (trainer.hf, apart))
    assert all(torch.equal(bare[name], weight) for name, weight in base.items())
    settings, adapters = adapters_of(runs[run])
    found = read_peft(apart / "lora", open_source(runs[run]).base.arch)
    assert found[0] == settings
    assert all(
        torch.equal(found[1][k][n], t) for k, own in adapters.items() for n, t in own.items()
    )


def test_half_precision_weights_are_compared_as_what_they_are(tmp_path):
    """Merged ones as rounded sums; apart nothing is rounded."""
    trainer = Trainer(tmp_path, dtype=torch.bfloat16)
    run = tmp_path / "run"
    trainer.train(run, train__steps=2, lora__rank=2, **ALONE)
    for how, tolerance in (("merge", 8 / 128), ("apart", 1e-4)):
        megatron_to_hf(run, tmp_path / how, lora=how)
        difference, tolerated = compare(run, tmp_path / how, ONE_RANK)
        assert difference < tolerated == tolerance
        assert (difference > 1e-4) == (how == "merge")


def test_adapters_alone_are_exported_as_a_plain_dense_model(trainer, runs, exports):
    original = json.loads((trainer.hf / "config.json").read_text())
    for how in ("merge", "apart"):
        export = exports["alone", how]
        config = json.loads((export / "config.json").read_text())
        assert "routing" not in config
        assert config["architectures"] == original["architectures"]
        assert not list(export.glob("*.py"))
        AutoModelForCausalLM.from_pretrained(export)
    hf_to_megatron(exports["alone", "merge"], trainer.folder / "again")
    difference, _ = compare(trainer.folder / "again", exports["alone", "merge"], ONE_RANK)
    assert difference < 1e-5


def test_a_damaged_adapter_of_an_export_is_named(exports, tmp_path):
    export = shutil.copytree(exports["both", "apart"], tmp_path / "export")
    path = export / "lora" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=rf"lora/{WEIGHTS}: its content is not what was written"):
        load_model(export)


def test_adapters_are_not_left_behind_unsaid(trainer, runs, tmp_path, monkeypatch, capsys):
    tool = "convert_megatron_to_hf.py"
    for asked, said in (
        (("--load", trainer.base, "--lora", "merge"), "--lora merge: .* has no adapters"),
        (("--load", runs["both"], "--routers-only"), "--routers-only: these routers were trained"),
        (("--load", trainer.base, "--routers", runs["both"]), "--routers .*both: these routers"),
        (("--load", runs["both"], "--routers-only", "--lora", "apart"), "no --lora"),
    ):
        assert run_tool(monkeypatch, tool, *asked, "--save", tmp_path / "export") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        with pytest.raises(ValueError, match=said):
            raise ValueError(error)
        assert not (tmp_path / "export").exists()
    with pytest.raises(ValueError, match="were trained with adapters"):
        hf_to_megatron(trainer.hf, tmp_path / "base", routers_path=runs["both"])
    with pytest.raises(ValueError, match="holds no routers"):
        export_routers(runs["alone"], tmp_path / "routers")


def test_the_tool_says_where_adapters_are(runs, tmp_path, monkeypatch, capsys):
    save = tmp_path / "export"
    asked = ("--load", runs["alone"], "--save", save, "--lora", "apart")
    assert run_tool(monkeypatch, "convert_megatron_to_hf.py", *asked) == 0
    assert str(save / "lora") in capsys.readouterr().out
    asked = ("--hf-path", save / "lora", "--save", tmp_path / "base")
    assert run_tool(monkeypatch, "convert_hf_to_megatron.py", *asked) == 2
    assert f"holds a PEFT adapter ({CONFIG})" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [ALONE, {"train__trainable": "routers+lora"}])
def test_a_peft_adapter_goes_in_and_comes_out(trainer, adapter, tmp_path, settings):
    given = {"model__lora": adapter, "train__steps": 0}
    trainer.train(tmp_path / "run", **given, **settings)
    megatron_to_hf(tmp_path / "run", tmp_path / "export", lora="apart")
    before, after = (load_file(f / WEIGHTS) for f in (adapter, tmp_path / "export" / "lora"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    theirs = logits(peft.PeftModel.from_pretrained(load(trainer.hf), adapter))
    if settings is ALONE:
        assert torch.equal(logits(with_peft(tmp_path / "export")), theirs)
    trainer.train(tmp_path / "next", **{**given, "model__lora": tmp_path / "run"}, **settings)
    first, again = adapters_of(tmp_path / "run"), adapters_of(tmp_path / "next")
    assert first[0] == again[0]
    assert first[0].layers == (1, 3)
    assert first[0].targets == SETTINGS.targets
    for layer, own in first[1].items():
        assert all(torch.equal(again[1][layer][name], tensor) for name, tensor in own.items())


def test_adapters_stay_as_they_are_where_routers_train(trainer, tmp_path):
    folder = save_adapter(tmp_path / "adapter", trainer.hf, lora_dropout=0.5)
    expected = read_peft(folder, open_source(trainer.base).base.arch)
    settings = {"model__lora": folder, "train__trainable": "routers"}
    for name, value in {"dropout": 0.1, "lr": 0.1}.items():
        with pytest.raises(ValueError, match=f"lora.{name} = 0.1: would be ignored, because the"):
            trainer.train(tmp_path / "run", **settings, **{f"lora__{name}": value})
    trainer.train(tmp_path / "run", **settings, train__steps=2)
    folder.rename(tmp_path / "elsewhere")  # of which a run that goes on reads nothing
    trainer.train(tmp_path / "run", **settings, train__steps=3)
    found = adapters_of(tmp_path / "run")
    assert found[0] == replace(expected[0], dropout=0.0)
    for layer, own in expected[1].items():
        assert all(torch.equal(found[1][layer][name], tensor) for name, tensor in own.items())


def test_settings_agree_with_the_adapters_given(trainer, adapter, runs, tmp_path):
    given = {"model__lora": adapter, "train__steps": 0, **ALONE}
    same = {"lora__rank": 4, "lora__alpha": 6, "lora__layers": "[1, 3]", "lora__dropout": 0.25}
    trainer.train(tmp_path / "run", **given, **same, lora__targets="[down_proj, q_proj]")
    assert adapters_of(tmp_path / "run")[0].dropout == 0.25
    for field, value, said in (
        ("rank", 8, "lora.rank = 8: the adapters in .*adapter have 4"),
        ("alpha", 8, "lora.alpha = 8.0: the adapters in .*adapter have 6.0"),
        (
            "targets",
            "linear_qkv",
            r"lora.targets = \('q_proj', 'k_proj', 'v_proj'\): .* have \('q_",
        ),
        ("layers", "all", r"lora.layers = \(0, 1, 2, 3\): the adapters in .*adapter have \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=said):
            trainer.train(tmp_path / "other", **given, **{f"lora__{field}": value})
    for folder, said in (
        (trainer.base, "holds no adapters"),
        (trainer.hf, f"has no {CONFIG}"),
        (tmp_path / "nowhere", f"has no {CONFIG}"),
    ):
        with pytest.raises(ValueError, match=said):
            trainer.train(tmp_path / "other", **{**given, "model__lora": folder})
    export = runs["both"].with_name("both-apart")
    with pytest.raises(ValueError, match="both-apart: is an export; its adapters are in"):
        trainer.train(tmp_path / "other", **{**given, "model__lora": export})
    assert not (tmp_path / "other").exists()
