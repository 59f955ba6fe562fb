"""launch/pretrain_router.sh: what the knobs become, and what is refused of them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.text import write_lines

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--data.max_length", "64", "--train.global_batch_size", "4"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny model and some text, as a user has them."""
    tiny.save_llama(tmp_path / "hf")
    write_lines(
        tmp_path / "data/reformatted/alpaca/data.jsonl", [{"prompt": "a", "completion": "b"}]
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def one_node(monkeypatch):
    """launch/one_node.py, and the commands that it starts or becomes."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import one_node

    started: list[list[str]] = []

    def convert(command: list[str]) -> int:
        started.append(command)
        Path(command[-1]).mkdir()
        return 0

    monkeypatch.setattr(one_node, "run_command", convert)
    monkeypatch.setattr(one_node.os, "execve", lambda _, command, __: started.append(command))
    for knob in one_node.KNOBS:
        monkeypatch.delenv(knob.name, raising=False)

    def run(*words: str, **knobs: str) -> list[list[str]]:
        started.clear()
        with monkeypatch.context() as patch:
            for name, value in {"MODEL_NAME_OR_PATH": "hf", "ROUTER_LAYERS": "2", **knobs}.items():
                patch.setenv(name, value)
            one_node.main(words)
        return list(started)

    return run


def test_knobs_become_settings_and_the_model_is_converted_once(one_node, place):
    knobs = {
        "NUM_PROCESSES": "2", "MAX_TRAIN_SAMPLES": "7", "GRANULARITY": "mlp_token",
        "TARGET_CAPACITY": "0.7", "LEARNING_RATE": "1e-3", "WEIGHT_DECAY": "0.1",
        "NUM_EPOCHS": "2.5",
    }  # fmt: skip
    convert, train = one_node(*SMALL, **knobs)
    assert convert[1].endswith("tools/convert_hf_to_megatron.py")
    assert convert[2:] == ["--hf-path", "hf", "--save", "runs/hf/megatron"]
    assert train[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    assert train[4:6] == ["--nproc_per_node", "2"]
    assert train[6].endswith("launch/pretrain_router.py")
    name = "alpaca_7_mlp_token_layers2_capacity0.7_lr1e-3_wd0.1_epochs2.5"
    for option in (
        "--data.train=data/reformatted/alpaca/data.jsonl", "--data.max_train_samples=7",
        "--router.granularity=mlp_token", "--router.layers.deepest=2", "--router.capacity=0.7",
        "--optimizer.lr=1e-3", "--optimizer.weight_decay=0.1", "--train.epochs=2.5",
        "--model.checkpoint=runs/hf/megatron", f"--checkpoint.save=runs/hf/{name}",
    ):  # fmt: skip
        assert option in train
    assert train[-4:] == SMALL
    (again,) = one_node(*SMALL, **knobs)
    assert again == train
    shutil.copytree(place / "hf", place / "other" / "hf")
    with pytest.raises(ValueError, match="runs/hf/megatron was converted from another folder"):
        one_node(*SMALL, MODEL_NAME_OR_PATH="other/hf")
    (dry,) = one_node(*SMALL, "--dry-run", MEGATRON_PATH="new")
    assert {"--model.checkpoint=null", "--model.hf_path=hf", "--dry-run"} <= set(dry)
    assert "torch.distributed.run" not in dry
    (everywhere,) = one_node(*SMALL, ROUTER_LAYERS="all")
    assert "--router.layers=all" in everywhere
    (by_steps,) = one_node(*SMALL, "--train.steps=3", "--router.layers=[1]", ROUTER_LAYERS="")
    assert not [
        word for word in by_steps if word.startswith(("--train.epochs", "--router.layers.d"))
    ]


@pytest.mark.parametrize(
    ("knobs", "words", "message"),
    [
        ({"NUM_PROCESSES": "two"}, [], "NUM_PROCESSES = two: must be a whole number"),
        ({"PORT": "99999"}, [], "PORT = 99999: must be a whole number from 1 to 65535"),
        ({"LEARNING_RATE": "fast"}, [], "LEARNING_RATE: optimizer.lr = fast: must be a number"),
        ({"TARGET_CAPACITY": "2"}, [], "TARGET_CAPACITY: router.capacity = 2.0: must be above 0"),
        ({"GRANULARITY": "attn"}, [], "GRANULARITY: router.granularity = attn: must be"),
        ({"ROUTER_LAYERS": "40"}, SMALL, "ROUTER_LAYERS: router.layers.deepest = 40: this model"),
        ({"NUM_PROCESSES": "3"}, SMALL, "multiple of train.micro_batch_size (1) x data-parallel"),
        ({"DATA_TYPE": "mixed"}, [], "DATA_TYPE = mixed: there is no data/mixed/data.jsonl here"),
        ({"mindskip_n": "16"}, [], "mindskip_n = 16: is called ROUTER_LAYERS here"),
        ({"MODEL_NAME_OR_PATH": ""}, [], "MODEL_NAME_OR_PATH: must be set"),
        ({"MODEL_NAME_OR_PATH": "a/b"}, [], "MODEL_NAME_OR_PATH = a/b: no such folder"),
        ({"NUM_EPOCHS": "2"}, ["--train.steps=9"], "NUM_EPOCHS = 2 and --train.steps=9 say the"),
        ({}, ["--model.hf_path=hf"], "MODEL_NAME_OR_PATH = hf: would be ignored beside"),
        ({}, ["--model.config=hf"], "MODEL_NAME_OR_PATH = hf: would be ignored beside"),
        ({}, ["--config", "a.yaml"], "--config: this script has knobs in its place"),
        ({}, ["--trian.steps=9"], "unknown key 'trian.steps'; did you mean 'train.steps'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_variables_name(
    one_node, place, knobs, words, message
):
    with pytest.raises(ValueError) as caught:
        one_node(*words, **knobs)
    assert message in str(caught.value)
    assert not (place / "runs").exists()


def test_a_port_that_is_taken_is_refused(one_node, place):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"PORT = \d+: Address already in use"):
            one_node(PORT=str(taken.getsockname()[1]))


def test_help_needs_nothing_installed():
    done = subprocess.run(
        ["bash", "launch/pretrain_router.sh", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    for knob in ("NUM_PROCESSES", "PORT", "DATA_TYPE", "TARGET_CAPACITY", "NUM_EPOCHS"):
        assert f"\n  {knob} " in done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not here")
def test_the_script_is_clean():
    subprocess.run(["shellcheck", "launch/pretrain_router.sh"], cwd=ROOT, check=True)


@pytest.mark.slow
def test_the_script_trains(place):
    tiny.save_tokenizer(tiny.save_llama(place / "small", vocab_size=tiny.VOCAB))
    knobs = {"MODEL_NAME_OR_PATH": "small", "NUM_PROCESSES": "2", "ROUTER_LAYERS": "2"}
    command = ["bash", ROOT / "launch" / "pretrain_router.sh", *SMALL, "--checkpoint.save=run"]
    env = {**os.environ, **knobs}
    subprocess.run(command, env=env, check=True)
    assert (place / "run" / "summary.json").exists()
