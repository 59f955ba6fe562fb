"""Models without weights: what ``model.config`` may say, and where their parameters start."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_mod.config import cli
from megatron_mod.conversion.scratch import NewModel, new_architecture, open_new
from megatron_mod.conversion.source import open_base
from megatron_mod.data.tokenizer import open_tokenizer
from tests.helpers import tiny
from tests.helpers.runs import metrics, saved
from tests.helpers.tools import run_tool

SHAPE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def settings(tokenizer, tmp_path):
    """Arguments of a training from scratch; ``None`` leaves one out."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of {n * n % 97} abc {'xyz' * (n % 5)}\n" for n in range(99)))

    def arguments(config: object, **changes: object) -> list[str]:
        config = json.dumps(config) if isinstance(config, dict) else config
        values = {
            "model.config": config, "model.dtype": "float32", "router.layers": "[]",
            "data.train": text, "data.format": "text", "data.tokenizer": tokenizer,
            "data.max_length": 64, "train.trainable": "all", "train.steps": 2,
            "train.global_batch_size": 4, "optimizer.lr": 0.01, "checkpoint.save": tmp_path / "run",
            **{name.replace("__", "."): value for name, value in changes.items()},
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in values.items() if value is not None]

    return arguments


def test_what_is_left_out_is_the_family_s_the_tokenizer_s_and_the_data_s(settings, tokenizer):
    for family, more in (
        ("llama", {}), ("mistral", {"num_key_value_heads": 2}),
        ("qwen2", {"num_key_value_heads": 4}), ("qwen3", {"num_key_value_heads": 2}),
    ):  # fmt: skip
        fields = {**SHAPE, **more, "model_type": family}
        config = cli.parse(
            [*settings(None), *(f"--model.config.{name}={value}" for name, value in fields.items())]
        )
        found = open_new(config)
        like = AutoConfig.for_model(**fields)
        assert (found.arch.vocab_size, found.arch.max_sequence_length) == (tiny.VOCAB, 64)
        assert found.arch.num_query_groups == like.num_key_value_heads
        assert found.arch.layernorm_epsilon == like.rms_norm_eps
        assert found.hf_config["eos_token_id"] == open_tokenizer(tokenizer).eos_token_id
        assert new_architecture(config) == found.arch


def test_a_file_or_a_folder_says_all(settings, tokenizer, tmp_path):
    own = tiny.save_tokenizer(tiny.save_llama(tmp_path / "hf", vocab_size=300))
    bare = tmp_path / "bare" / "shape.json"
    bare.parent.mkdir()
    bare.write_text((own / "config.json").read_text())
    for config, place, given in (
        (own, own, None), (own / "config.json", own, None), (bare, tokenizer, tokenizer)
    ):  # fmt: skip
        found = open_new(cli.parse(settings(config, data__tokenizer=given)))
        assert found.arch == open_base(own).arch
        assert found.huggingface == place


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        ({**SHAPE, "model_type": "gpt2"}, {}, "model.config: model_type = 'gpt2' is not supported"),
        ({**SHAPE, "hidden_sise": 3}, {}, "model.config.hidden_sise = 3: no field of a llama"),
        ({**SHAPE, "hidden_size": 33}, {}, "num_attention_heads = 4: does not divide hidden_size"),
        ({**SHAPE, "hidden_size": 12}, {}, "model.config: head_dim = 3: must be even"),
        ({**SHAPE, "num_key_value_heads": 3}, {}, "num_key_value_heads = 3: does not divide"),
        ({**SHAPE, "model_type": "qwen3"}, {}, r"= 32: does not .*That is qwen3's default"),
        ({**SHAPE, "hidden_size": "wide"}, {}, "hidden_size = 'wide': must be a whole number"),
        ({**SHAPE, "mlp_bias": True}, {}, "model.config: mlp_bias = True is not supported"),
        ({**SHAPE, "vocab_size": 99}, {}, "vocab_size = 99: the tokenizer in .* knows 259 tokens"),
        (SHAPE, {"data__tokenizer": None}, "data.tokenizer: must be set, because model.config"),
        ("nowhere", {}, "model.config = nowhere: no such file or folder; give a config.json"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings, config, changes, said):
    with pytest.raises(ValueError, match=said):
        open_new(cli.parse(settings(config, **changes)))


def test_weights_start_as_megatron_s_and_any_part_alike(settings):
    fields = {**SHAPE, "model_type": "qwen2", "num_key_value_heads": 2, "hidden_size": 320}
    found = open_new(cli.parse(settings(fields)))
    with found.weights() as weights:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**found.hf_config))
        assert weights.names() == set(model.state_dict())
        for name, like in model.state_dict().items():
            tensor = weights.tensor(name)
            assert tensor.shape == like.shape
            assert torch.equal(weights.rows(name, 3, 262), tensor[3:262])
            if name.endswith(".bias"):
                assert not tensor.any()
            elif tensor.dim() == 1:
                assert (tensor == 1).all()
            else:
                scaled = math.sqrt(2 * 4) if "o_proj" in name or "down_proj" in name else 1
                assert tensor.std() == pytest.approx(0.02 / scaled, rel=0.03), name
                assert abs(tensor.mean()) < 0.01 / scaled
        embedding = weights.tensor("model.embed_tokens.weight")
        assert not torch.equal(embedding, weights.tensor("lm_head.weight"))
    with replace(found, seed=5).weights() as others:
        assert not torch.equal(embedding, others.tensor("model.embed_tokens.weight"))
    assert replace(found, seed=5).fingerprint() != found.fingerprint()


def test_a_training_from_scratch_stands_alone_and_goes_on(
    settings, tokenizer, tmp_path, single_process, monkeypatch
):
    """A step has config and tokenizer; going on asks for the same shape, and the bits are those of
    the run in one go."""
    from megatron_mod.training.loop import train
    from megatron_mod.training.plan import prepare

    def run(**changes: object) -> dict:
        config = cli.parse(settings(changes.pop("config", SHAPE), **changes))
        return train(config, prepare(config))

    run(checkpoint__interval=1, checkpoint__keep=0)
    whole, step = saved(tmp_path / "run"), tmp_path / "run" / "step_00000002"
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(math.log(tiny.VOCAB), rel=0.02)
    hf_config = json.loads((step / "huggingface" / "config.json").read_text())
    assert hf_config["architectures"] == ["LlamaForCausalLM"]
    assert hf_config["dtype"] == "float32"
    assert open_tokenizer(step / "huggingface").get_vocab() == open_tokenizer(tokenizer).get_vocab()
    with pytest.raises(ValueError, match="model.config = .*'hidden_size': 64.* was started with"):
        run(config={**SHAPE, "hidden_size": 64})
    for name in ("step_00000002", "summary.json"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    run(checkpoint__interval=1, checkpoint__keep=0)
    assert saved(tmp_path / "run") == whole
    assert metrics(tmp_path / "run") == lines
    monkeypatch.setenv("WORLD_SIZE", "1")
    status = run_tool(
        monkeypatch, "convert_megatron_to_hf", "--load", tmp_path / "run", "--save", tmp_path / "hf"
    )
    assert status == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.hidden_size == 32


def test_a_dry_run_and_an_estimate_know_it(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert run_tool(monkeypatch, "train", "--dry-run", *settings(SHAPE)) == 0
    said = capsys.readouterr().out
    parameters = new_architecture(cli.parse(settings(SHAPE))).num_parameters
    assert f"{parameters:,}, of which {parameters:,} train" in said
    assert "found    data.tokenizer" in said
    for config, changes, problem in (
        (SHAPE, {"data__tokenizer": None}, "data.tokenizer: must be set"),
        (tmp_path / "none.json", {}, "model.config = "),
    ):
        assert run_tool(monkeypatch, "train", "--dry-run", *settings(config, **changes)) == 2
        assert problem in capsys.readouterr().err


def test_a_sentencepiece_model_is_its_tokenizer_s_only_file(tmp_path):
    place = tmp_path / "pieces.model"
    place.write_bytes(b"pieces")
    base = NewModel("config", place, place, None, None, hf_config={"vocab_size": 3})
    assert base.companions().keys() == {"tokenizer.model", "config.json"}
