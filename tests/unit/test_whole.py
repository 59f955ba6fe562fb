"""Training a whole model: what its steps hold, what comes of them, and what is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_mod.checkpoint.distributed import load_tensors
from megatron_mod.checkpoint.manifest import read_manifest
from megatron_mod.config import cli
from tests.helpers.runs import DEFAULT, Trainer, metrics, saved

ALL = {
    "train__trainable": "all", "optimizer__lr": 0.005, "optimizer__weight_decay": 0.1,
    "optimizer__average_fraction": 0.5, "train__steps": 4,
}  # fmt: skip
DENSE = {**dict.fromkeys((*DEFAULT, "router__layers__deepest")), "router__layers": "[]", **ALL}
ROUTED = {**DEFAULT, "router__init": "zeros", "train__recompute": "selective", **ALL}
RUNS = {
    "dense": (DENSE, {"checkpoint__keep": 1}),
    "routed": (ROUTED, {}),
    "routed_bfloat16": (
        ROUTED,
        {
            "model__dtype": "bfloat16",
            "router__stand_in": "none",
            "parallel__use_distributed_optimizer": "true",
        },
    ),
    "dense_bfloat16": (DENSE, {"model__dtype": "bfloat16"}),
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("trainer"), num_key_value_heads=2)


@pytest.fixture(scope="module")
def runs(trainer, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Finished runs and their settings, whose base is nowhere any more."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    own = Trainer(folder / "own", num_key_value_heads=2)
    for name, (settings, changes) in RUNS.items():
        made[name] = folder / name, {**settings, "checkpoint__keep": 0, **changes}
        own.train(*made[name][:1], **made[name][1])
    shutil.rmtree(own.base)
    gone = {"model__checkpoint": own.base, "data__train": own.text}
    return {name: (run, settings | gone) for name, (run, settings) in made.items()}


def restored(load: Path, dtype: torch.dtype = torch.float32):
    from megatron_mod.conversion.restore import restore_model
    from megatron_mod.conversion.source import open_source
    from megatron_mod.parallel.topology import ONE_RANK

    return restore_model(open_source(load), ONE_RANK, dtype=dtype)[0]


@pytest.mark.parametrize("name", RUNS)
def test_an_export_needs_nothing_else_and_has_the_logits_of_the_trained_model(
    runs, name, tmp_path, monkeypatch
):
    from transformers import AutoModelForCausalLM

    from megatron_mod.conversion.convert import megatron_to_hf
    from megatron_mod.evaluation.parity import max_relative_difference, prompt_batch

    run, settings = runs[name]
    export = tmp_path / "export"
    megatron_to_hf(run, export)
    batches = [prompt_batch([list(range(5, 25)), [7, 9, 30]])]
    assert max_relative_difference(restored(run), export, batches) < 1e-5
    config = json.loads((export / "config.json").read_text())
    assert config["dtype"] == settings.get("model__dtype", "float32")
    assert ("routing" in config) == name.startswith("routed")
    if "routing" in config:
        return
    assert not list(export.glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(export)
    assert model.dtype == getattr(torch, config["dtype"])
    # The mean over the last two steps, rounded to the parameters' dtype once.
    tensors = load_tensors(run / "step_00000004" / "state")
    key = "decoder.final_layernorm.weight"
    mean = tensors[f"average.{key}"]
    assert mean.dtype == torch.float32
    assert not torch.equal(mean, tensors[key].float())
    assert torch.equal(model.model.norm.weight, mean.to(model.dtype))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_to_the_last_bit_from_its_steps_alone(runs, trainer, name, tmp_path):
    run, settings = runs[name]
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    if name == "dense":  # its earlier steps are gone
        trainer.train(whole, **settings)
        assert saved(whole) == saved(run)
        return
    shutil.rmtree(whole / "step_00000004")
    summary = trainer.train(whole, **settings)
    assert metrics(whole) == metrics(run)
    assert saved(whole) == saved(run)
    first, last = (read_manifest(whole / f"step_0000000{n}") for n in (2, 4))
    for field in ("base", "base_config", "base_fingerprint", "run"):
        assert first[field] == last[field], field
    held = {k for k in saved(run) if k.startswith("optimizer.state.param.")}
    parameters = {k for k in saved(run) if k.startswith("decoder.layers.0")}
    assert bool(held) == name.endswith("bfloat16")
    assert not any("router" in k or "stand_in" in k for k in held), "float32 is kept once"
    assert len({k.removeprefix("optimizer.state.param.") for k in held} & parameters) in (
        0,
        len(parameters),
    )
    assert summary["train"]["frozen_parameters_changed"] == 0


def test_a_flipped_byte_is_named(runs, trainer, tmp_path):
    from megatron_mod.conversion.source import open_source

    run, settings = runs["dense"]
    for name in ("huggingface/tokenizer.json", "huggingface/config.json", "state/__0_0.distcp"):
        damaged = tmp_path / name.replace("/", "_")
        shutil.copytree(run, damaged)
        path = damaged / "step_00000004" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(name)):
            open_source(damaged)
        with pytest.raises(ValueError, match=f"{re.escape(name)}.*Remove .*step_00000004"):
            trainer.train(damaged, **settings)


@pytest.mark.parametrize("name", ["dense", "routed"])
def test_a_run_is_the_base_of_the_next_training(runs, trainer, name, tmp_path, capsys):
    from megatron_mod.conversion.convert import megatron_to_hf

    run, settings = runs[name]
    save = tmp_path / "next"
    trainer.train(save, **{**settings, "model__checkpoint": run, "train__steps": 0})
    mine, theirs = (
        load_tensors(save / "step_00000000" / "state"),
        load_tensors(run / "step_00000004" / "state"),
    )
    for key in (key for key in theirs if key.startswith("average.")):
        assert torch.equal(mine[key.removeprefix("average.")], theirs[key]), key
    assert read_manifest(save / "step_00000000")["base"] == str((run / "step_00000004").resolve())
    megatron_to_hf(save, tmp_path / "export")

    routers = tmp_path / "routers"  # into the trained model, which is frozen now
    base = {**settings, "model__checkpoint": run, "train__trainable": "routers"}
    if name == "dense":
        base |= {**DEFAULT, "router__layers__deepest": 2, "router__layers": None}
    trainer.train(routers, **base)
    assert restored(routers).routed_layers()
    assert "frozen in float32" in capsys.readouterr().out


def test_routers_do_not_leave_the_model_they_were_trained_with(runs, trainer, tmp_path):
    from megatron_mod.conversion.convert import export_routers, hf_to_megatron

    run, settings = runs["routed"]
    with pytest.raises(ValueError, match=r"model\.routers = .*trained with all of their model"):
        trainer.train(
            tmp_path / "run",
            **{**settings, "model__checkpoint": trainer.base, "model__routers": run},
        )
    with pytest.raises(ValueError, match="--routers-only: these routers were trained with all"):
        export_routers(run, tmp_path / "routers")
    with pytest.raises(ValueError, match="--routers .*: these routers were trained with all"):
        hf_to_megatron(trainer.hf, tmp_path / "base", routers_path=run)


def test_given_routers_train_on_with_the_model(trainer, tmp_path):
    routers, whole = tmp_path / "routers", tmp_path / "whole"
    settings = {**ROUTED, "optimizer__average_fraction": 0}
    trainer.train(routers, **{**settings, "train__trainable": "routers"})
    trainer.train(whole, **{**settings, "train__steps": 1}, model__routers=routers)
    given = load_tensors(routers / "step_00000004" / "state", ".router.")
    first = load_tensors(whole / "step_00000001" / "state", "decoder.")
    for key in (key for key in given if key.startswith("decoder.")):
        apart = (given[key] - first[key]).abs().max()
        assert 0 < apart < 0.02, key  # one step away


def test_a_dry_run_of_a_run_that_goes_on_needs_no_base(runs, trainer, monkeypatch, capsys):
    from tests.helpers.tools import run_tool

    monkeypatch.setattr("megatron_mod.commands.train.catch_signals", lambda: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run, settings = runs["dense_bfloat16"]
    arguments = trainer.arguments(run, **settings)
    assert run_tool(monkeypatch, "train", "--dry-run", *arguments) == 0
    said = capsys.readouterr().out
    assert re.search(r"unused +model\.checkpoint", said)
    number = r"([\d,]+)"
    total, trained = re.search(rf"parameters +{number}, of which {number} train", said).groups()
    assert total == trained


def test_a_base_elsewhere_would_be_ignored(runs):
    from megatron_mod.config.model_folder import check_base

    run, _ = runs["dense"]
    for load in (run, run / "step_00000004"):
        with pytest.raises(ValueError, match="--base there: would be ignored"):
            check_base("there", str(load))


def test_norms_and_biases_do_not_decay(single_process, tmp_path):
    from megatron_mod.conversion.convert import hf_to_megatron
    from megatron_mod.conversion.restore import load_model
    from megatron_mod.conversion.source import open_base
    from megatron_mod.parallel.topology import ONE_RANK
    from megatron_mod.training.optimizer import build_optimizer, wrap_ddp
    from tests.helpers import tiny

    hf = tiny.save_model(tmp_path / "hf", "qwen2", num_key_value_heads=2)
    hf_to_megatron(hf, tmp_path / "base")
    config = cli.parse(
        ["--model.hf_path=m", "--data.train=d", "--train.steps=4", "--checkpoint.save=c"]
        + ["--train.trainable=all", "--optimizer.weight_decay=0.1", "--router.layers=[]"]
    )
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(
            open_base(tmp_path / "base"), None, ONE_RANK,
            implementation="local", dtype=dtype, trained=config.train.parts,
        )  # fmt: skip
        names = {p: name for name, p in model.named_parameters()}
        chunks = wrap_ddp(model, use_distributed_optimizer=False)
        optimizer, _ = build_optimizer(chunks, config, steps=4)
        mains = {id(getattr(p, "main_param", p)): name for p, name in names.items()}
        decays = {
            mains[id(p)]: group["wd_mult"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert decays.keys() == set(names.values())
        for name, decay in decays.items():
            assert decay == (0.0 if "norm" in name or name.endswith(".bias") else 1.0), name


def test_what_is_said(runs, capsys, trainer):
    run, settings = runs["routed"]
    trainer.train(run, **settings)
    said = capsys.readouterr().out
    assert "4 layers (local) in float32; training all of it with 2 routers (" in said
    assert "stepped in float32), attn_token on layers [1, 2]" in said
    assert f"the whole model is in {run}" in said
    assert "frozen" not in said
