"""Commands as a user runs them, on a tiny model: the README's, and a training's at several
topologies."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_mod.checkpoint.distributed import load_tensors
from tests.distributed import cases
from tests.helpers.commands import blocks, read_metrics, run, save_tiny, settings, torchrun


@pytest.fixture(scope="module")
def tiny_hf(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="module")
def base_settings(tiny_hf, single_process):
    base, data = tiny_hf.parent / "megatron", tiny_hf.parent / "data"
    cases.convert(tiny_hf, base)
    run(sys.executable, "tools/make_python_docs.py", "--save", data, "--held_out", 12)
    return settings(base, data / "validation.jsonl")


# in one process, test_granularities and test_resume_topologies hold the same
def test_steps_are_the_same_at_every_topology(base_settings, tmp_path):
    """Three optimizer steps: data 2 with a distributed optimizer, and pipeline 2 whose first
    stage owns no router at all."""
    common = [*base_settings, "--router.layers", "[2, 3]", "--train.steps", 3]
    printed = torchrun(
        2, "launch/pretrain_router.py", *common, "--checkpoint.save", tmp_path / "data",
        "--parallel.use_distributed_optimizer", "true", "--checkpoint.interval", 2,
    )  # fmt: skip
    assert "data 2" in printed
    assert "2 routers (64 parameters" in printed
    saved = sorted(path.name for path in (tmp_path / "data").glob("step_*"))
    assert saved == ["step_00000002", "step_00000003"]
    torchrun(
        2, "launch/pretrain_router.py", *common, "--checkpoint.save", tmp_path / "pipeline",
        "--parallel.pipeline_model_parallel_size", 2,
    )  # fmt: skip
    run(
        sys.executable, "launch/pretrain_router.py", *common,
        "--checkpoint.save", tmp_path / "one",
    )  # fmt: skip
    wanted = read_metrics(tmp_path / "one")
    assert len({step["loss"] for step in wanted}) == 3
    for name in ("data", "pipeline"):
        for step, expected in zip(read_metrics(tmp_path / name), wanted, strict=True):
            for key in ("loss", "task_loss", "grad_norm", "capacity", "learning_rate", "tokens"):
                assert step[key] == pytest.approx(expected[key], rel=1e-4), (name, key)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["train"]["frozen_parameters_changed"] == 0


@pytest.mark.usefixtures("single_process")
def test_bfloat16_with_sequence_parallelism(base_settings, tmp_path):
    """Half the digits, the same loss to a percent; routers stay float32."""
    common = [*base_settings, "--train.steps", 1, "--router.pooling", "all"]
    torchrun(
        2, "launch/pretrain_router.py", *common, "--checkpoint.save", tmp_path / "half",
        "--parallel.tensor_model_parallel_size", 2, "--parallel.sequence_parallel", "true",
        "--model.dtype", "bfloat16",
    )  # fmt: skip
    run(
        sys.executable, "launch/pretrain_router.py", *common, "--checkpoint.save", tmp_path / "one",
    )  # fmt: skip
    (half,), (one,) = read_metrics(tmp_path / "half"), read_metrics(tmp_path / "one")
    assert half["loss"] == pytest.approx(one["loss"], rel=0.01)
    assert half["loss"] != one["loss"]
    saved = load_tensors(tmp_path / "half" / "step_00000001" / "state", keep="router.weight")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_no_steps_export_untrained_routers(base_settings, tmp_path):
    torchrun(
        2, "launch/pretrain_router.py", *base_settings, "--checkpoint.save", tmp_path / "zeros",
        "--parallel.pipeline_model_parallel_size", 2, "--router.layers", "[3]", "--train.steps", 0,
    )  # fmt: skip
    run(
        sys.executable, "tools/convert_megatron_to_hf.py",
        "--load", tmp_path / "zeros", "--save", tmp_path / "export",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert not model.model.layers[3].router.weight.any()
    assert [layer.router is not None for layer in model.model.layers] == [False] * 3 + [True]


def test_readme_commands_run(tiny_hf, tmp_path):
    """The step-by-step commands, with the tiny model in SmolLM2's place and its few steps."""
    (commands,) = (
        block for block in blocks("README.md", "bash") if "convert_hf_to_megatron" in block
    )
    commands = commands.replace("\\\n", " ").replace("runs/", f"{tmp_path}/")
    done = []
    for line in commands.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        script = next(Path(word).name for word in words if word.endswith(".py"))
        if script == "get_smollm2.py":
            Path(words[-1]).symlink_to(tiny_hf)
            continue
        if script == "pretrain_router.py":
            words += ["--train.steps", "1", "--router.layers.deepest", "2"]
            words += ["--data.max_length", "200", "--train.validation_interval", "1"]
        bin_folder = Path(sys.executable).parent
        run(*words, PATH=f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
        done.append(script)
    assert {"convert_hf_to_megatron.py", "pretrain_router.py", "convert_megatron_to_hf.py",
            "compare_logits.py", "make_python_docs.py"} <= set(done)  # fmt: skip
