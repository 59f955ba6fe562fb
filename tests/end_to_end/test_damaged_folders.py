"""Hugging Face folders that are damaged, wherever they are given: one message, nothing left."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mod.conversion import convert
from megatron_mod.conversion.source import open_base
from megatron_mod.evaluation.backend import Backend
from megatron_mod.evaluation.huggingface import load_huggingface, load_model
from megatron_mod.evaluation.huggingface_backend import HuggingFaceBackend
from megatron_mod.evaluation.rows import Row
from tests.helpers import tiny
from tests.helpers.broken import DAMAGES, UP, WEIGHTS, edit_config, edit_tensors, put
from tests.helpers.routed import save_export
from tests.helpers.runs import Trainer
from tests.helpers.tools import run_tool

pytestmark = pytest.mark.usefixtures("single_process")
ROUTER = "model.layers.2.router.weight"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("damaged"))


@pytest.fixture(scope="module")
def export(trainer):
    routers = {layer: torch.ones(1, 32) for layer in (1, 2)}
    return save_export(trainer.folder / "export", trainer.hf, routers)


@pytest.fixture
def copy(tmp_path):
    return lambda folder: shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize("case", DAMAGES)
def test_it_is_not_converted(trainer, copy, case, tmp_path, monkeypatch, capsys):
    breaks, message = DAMAGES[case]
    breaks(folder := copy(trainer.hf))
    out = tmp_path / "out"
    arguments = ("--hf-path", folder, "--save", out / "base")
    with monkeypatch.context() as context:  # it makes a world of its own
        context.setattr("megatron_mod.parallel.topology.single_process", contextlib.nullcontext)
        assert run_tool(monkeypatch, "convert_hf_to_megatron.py", *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert message in said
    assert not list(out.glob("*"))


@pytest.mark.parametrize("case", DAMAGES)
def test_no_training_starts_from_it(trainer, copy, case, tmp_path):
    breaks, message = DAMAGES[case]
    breaks(folder := copy(trainer.hf))
    with pytest.raises(ValueError) as caught:
        trainer.train(tmp_path / "run", model__checkpoint=None, model__hf_path=folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("which", ["dense", "routed"])
@pytest.mark.parametrize("case", DAMAGES)
def test_it_is_not_judged(trainer, export, copy, case, which):
    breaks, message = DAMAGES[case]
    breaks(folder := copy(trainer.hf if which == "dense" else export))
    with pytest.raises(ValueError) as caught:
        load_huggingface(folder)
    assert message in str(caught.value)


def test_tools_say_so_in_one_message(trainer, export, copy, tmp_path, monkeypatch, capsys):
    edit_tensors(folder := copy(export), ROUTER)
    expected = f"error: {folder}: 1 tensors are missing: {ROUTER}.\n"
    asked = ("--load", folder, "--perplexity", trainer.text)
    assert run_tool(monkeypatch, "evaluate.py", *asked) == 2
    assert capsys.readouterr().err.endswith(expected)
    asked = ("--load", folder, "--data", trainer.text, "--capacity", "0.5", "--save")
    assert run_tool(monkeypatch, "calibrate_router.py", *asked, tmp_path / "new") == 2
    assert capsys.readouterr().err.endswith(expected)
    assert not (tmp_path / "new").exists()


def test_weights_of_a_checkpoint_that_are_no_numbers_are_named(trainer, tmp_path, monkeypatch):
    shutil.copytree(trainer.hf, tmp_path / "hf")
    put(tmp_path / "hf", UP, float("inf"))
    with monkeypatch.context() as context:  # a release that let them through
        context.setattr("megatron_mod.conversion.hf_reader.require_finite", lambda *a, **k: None)
        context.setattr("megatron_mod.conversion.convert.cast", lambda tensor, *args: tensor)
        convert.hf_to_megatron(tmp_path / "hf", tmp_path / "base")
    message = r"state: decoder.layers.1.mlp.linear_fc1.weight holds NaN or infinity"
    with pytest.raises(ValueError, match=message):
        convert.megatron_to_hf(tmp_path / "base", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    with pytest.raises(ValueError, match=message):
        trainer.train(tmp_path / "run", model__checkpoint=tmp_path / "base")


def test_routers_that_are_no_numbers_are_named(trainer, tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"is_mod": [False, True, False, False]}))
    save_file({"model.layers.1.router.weight": torch.full((1, 32), torch.nan)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"safetensors: model.layers.1.router.weight holds NaN"):
        convert.megatron_to_hf(trainer.base, tmp_path / "export", routers_path=folder)


def test_a_dtype_too_small_for_a_weight_is_refused(trainer, copy, tmp_path):
    put(folder := copy(trainer.hf), UP, 1e6)
    message = r"--dtype float16: .*linear_fc1.weight holds 1e\+06, more than .* 6.55e\+04"
    with pytest.raises(ValueError, match=message):
        convert.hf_to_megatron(folder, tmp_path / "base", dtype="float16")
    convert.hf_to_megatron(folder, tmp_path / "base")
    with pytest.raises(ValueError, match=f"--dtype float16: {UP} holds"):
        convert.megatron_to_hf(tmp_path / "base", tmp_path / "back", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "copy"]


@pytest.fixture
def overflowing(trainer, copy):
    """A model of finite weights whose logits are none."""
    folder = copy(trainer.hf)
    edit_tensors(folder, **{"model.norm.weight": torch.full((32,), 3e38)})
    return HuggingFaceBackend(*load_huggingface(folder))


def test_scores_that_are_no_numbers_are_errors(overflowing: Backend, trainer):
    rows = [Row.continuation([5], [6, 7]), Row.continuation([8], [9])]
    message = "logits are NaN or infinite for 2 of 2 texts.*activations overflow"
    with pytest.raises(ValueError, match=message):
        overflowing.score(rows)
    with pytest.raises(ValueError, match=message):
        overflowing.observe(rows, thresholds=())
    with pytest.raises(ValueError, match=message):
        overflowing.generate([[5], [8, 9]], until=(), max_new_tokens=3)


def test_a_perplexity_beyond_any_number_is_an_error(trainer, copy, monkeypatch, capsys):
    edit_tensors(folder := copy(trainer.hf), **{"model.norm.weight": torch.full((32,), 1e5)})
    asked = ("--load", folder, "--perplexity", trainer.text)
    assert run_tool(monkeypatch, "evaluate.py", *asked) == 2
    assert "error: the perplexity is above 1e307" in capsys.readouterr().err


def test_an_equal_output_layer_beside_a_tied_embedding_is_fine(trainer, tmp_path):
    hf = tiny.save_llama(tmp_path / "hf", vocab_size=tiny.VOCAB, tie_word_embeddings=True)
    tiny.save_tokenizer(hf)
    embedding = load_file(hf / WEIGHTS)["model.embed_tokens.weight"]
    edit_tensors(hf, **{"lm_head.weight": embedding.clone()})
    convert.hf_to_megatron(hf, tmp_path / "base")
    load_model(hf)
    trainer.train(tmp_path / "run", model__checkpoint=None, model__hf_path=hf, train__steps=0)
    convert.megatron_to_hf(tmp_path / "run", tmp_path / "export")
    load_model(tmp_path / "export")


def test_a_run_of_a_damaged_folder_is_not_exported(trainer, copy, tmp_path, monkeypatch):
    folder = copy(trainer.hf)
    trainer.train(tmp_path / "run", model__checkpoint=None, model__hf_path=folder, train__steps=0)
    fingerprint = open_base(folder).fingerprint()
    put(folder, UP, float("nan"))
    monkeypatch.setattr("megatron_mod.conversion.source.Base.fingerprint", lambda _: fingerprint)
    with pytest.raises(ValueError, match=f"{UP} holds NaN"):
        convert.megatron_to_hf(tmp_path / "run", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_two_descriptions_of_the_weights_are_refused(trainer, copy, tmp_path):
    folder = copy(trainer.hf)
    index = {"weight_map": {UP: "other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names other files; remove the one"):
        load_model(folder)
    shutil.copyfile(folder / WEIGHTS, folder / "other.safetensors")
    shutil.move(folder / WEIGHTS, folder / "again.safetensors")
    index["weight_map"]["model.norm.weight"] = "again.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"other.safetensors: .* is in again.safetensors too"):
        convert.hf_to_megatron(folder, tmp_path / "base")


TYPES = {
    "model_type": 5, "architectures": "LlamaForCausalLM", "auto_map": "x", "hidden_size": 32.5,
    "intermediate_size": [64], "num_attention_heads": 0, "num_key_value_heads": -1,
    "head_dim": "8", "vocab_size": True, "max_position_embeddings": "128", "rms_norm_eps": "1e-6",
    "rope_theta": 0, "rope_parameters": "default", "rope_scaling": [], "tie_word_embeddings": "no",
    "attention_bias": 0, "hidden_act": None, "attention_dropout": "0", "eos_token_id": "2",
    "layer_types": "full_attention", "sliding_window": "all", "dtype": "banana", "use_cache": 1,
    "initializer_range": "a",
}  # fmt: skip


@pytest.mark.parametrize("field", TYPES)
def test_a_field_of_the_wrong_type_is_named(trainer, copy, field, tmp_path):
    edit_config(folder := copy(trainer.hf), **{field: TYPES[field]})
    for call in (load_model, lambda f: convert.hf_to_megatron(f, tmp_path / "base")):
        if call is load_model and field == "hidden_act":
            continue  # null is what is not there; Transformers has a default
        with pytest.raises(ValueError, match=f"config.json: {field} = "):
            call(folder)


@pytest.mark.parametrize(
    "routing",
    [None, [], {}, {"granularity": "attn_sequence"}, {"layers": "1"}, {"layers": [9]},
     {"layers": [2, 1]}, {"threshold": "half"}, {"threshold": [0.5]}, {"threshold": 2},
     {"granularity": "attn_head"}, {"granularity": 1}, {"capacity": [0.5]}, {"pooling": 3},
     {"more": 1}, {"keys_values": "selected"}],
)  # fmt: skip
def test_a_routing_entry_that_is_none_is_refused(export, copy, routing):
    folder = copy(export)
    before = json.loads((folder / "config.json").read_text())["routing"]
    whole = routing in (None, [], {}) or set(routing) == {"granularity"}
    edit_config(folder, routing=routing if whole else {**before, **routing})
    with pytest.raises(ValueError, match="routing"):
        load_model(folder)


def test_an_export_is_as_it_was_written_or_saved_anew(trainer, export, tmp_path):
    """Any flipped bit is found; what Transformers saves over an export is judged as it is then."""
    base, out = tmp_path / "base", tmp_path / "export"
    convert.hf_to_megatron(trainer.hf, base)
    trainer.train(tmp_path / "run", model__checkpoint=base, train__steps=1)
    convert.megatron_to_hf(tmp_path / "run", out)
    load_model(out)
    damaged = shutil.copytree(out, tmp_path / "damaged")
    weights = bytearray((damaged / WEIGHTS).read_bytes())
    weights[-7] ^= 1
    (damaged / WEIGHTS).write_bytes(weights)
    with pytest.raises(ValueError, match=f"{damaged / WEIGHTS}: its content is not what was writt"):
        load_model(damaged)
    model = load_model(out)
    model.set_thresholds(0.25)
    model.save_pretrained(out)
    assert load_model(out).config.routing["threshold"] == 0.25
