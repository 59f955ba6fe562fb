"""Model folders from anybody: no code of theirs runs unasked, no link or name leads out of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_mod.config.evaluation import Request
from megatron_mod.conversion import convert
from megatron_mod.conversion.hf_reader import HFReader
from megatron_mod.data.tokenizer import open_tokenizer
from megatron_mod.evaluation.huggingface import load_huggingface, load_model
from megatron_mod.hf import FILES
from megatron_mod.hf.modeling_mod import MoDLlamaForCausalLM
from tests.helpers import tiny
from tests.helpers.broken import WEIGHTS, edit_config
from tests.helpers.routed import save_export
from tests.helpers.tools import run_tool

pytestmark = pytest.mark.usefixtures("single_process")

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "theirs"
class Model(LlamaForCausalLM):
    config_class = Config
"""
AUTO_MAP = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}


@pytest.fixture(scope="module")
def models(tmp_path_factory, single_process):
    """A dense folder, its base and an export."""
    folder = tmp_path_factory.mktemp("foreign")
    hf = tiny.save_tokenizer(tiny.save_llama(folder / "hf", vocab_size=tiny.VOCAB))
    convert.hf_to_megatron(hf, folder / "base")
    export = save_export(folder / "export", hf, {1: torch.ones(1, 32)})
    return hf, folder / "base", export


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Four, says everybody.")
    return path


def with_code(source: Path, folder: Path, *, model_type: str) -> tuple[Path, Path]:
    """A copy that brings code, and the file that shows whether it ran."""
    shutil.copytree(source, folder)
    marker = folder.with_name("ran")
    (folder / "theirs.py").write_text(CODE.format(marker=str(marker)))
    edit_config(folder, model_type=model_type, architectures=["Model"], auto_map=AUTO_MAP)
    return folder, marker


@pytest.mark.parametrize("model_type", ["llama", "theirs", "mod_llama"])
def test_code_of_a_folder_runs_only_when_trusted(
    models, tmp_path, text, monkeypatch, capsys, model_type
):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = with_code(models[0], tmp_path / "foreign", model_type=model_type)
    evaluate = ("evaluate.py", "--load", folder, "--perplexity", text)
    compare = ("compare_logits.py", "--load", models[1], "--hf-path", folder)
    for tool in (evaluate, compare):
        assert run_tool(monkeypatch, *tool) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert "--trust-remote-code" in said
    open_tokenizer(folder)
    with pytest.raises(ValueError, match="not run unasked"):
        load_model(folder)
    assert not marker.exists()
    if model_type == "theirs":
        for tool in (evaluate, compare):
            assert run_tool(monkeypatch, *tool, "--trust-remote-code") == 0
        assert marker.exists()


def test_code_of_a_tokenizer_or_of_generation_is_not_run(models, tmp_path):
    folder, marker = with_code(models[0], tmp_path / "foreign", model_type="llama")
    shutil.copyfile(models[0] / "config.json", folder / "config.json")
    (folder / "custom_generate").mkdir()
    code = CODE.format(marker=str(marker)) + "def generate(model, **kwargs): ...\n"
    (folder / "custom_generate" / "generate.py").write_text(code)
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "tokenizer_class": "Theirs"}
    path.write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": [None, "theirs.T"]}}))
    with pytest.raises(ValueError, match="generate.py: is code of the folder's own"):
        load_model(folder)
    shutil.rmtree(folder / "custom_generate")
    load_model(folder)
    with pytest.raises(ValueError, match="its tokenizer is code of the folder's own"):
        open_tokenizer(folder)
    assert not marker.exists()


@pytest.mark.parametrize("file", [file.name for file in FILES])
@pytest.mark.parametrize("change", ["edited", "missing", "another module"])
def test_an_export_runs_on_our_own_class(models, tmp_path, change, file):
    folder = shutil.copytree(models[2], tmp_path / "export")
    assert type(load_model(folder)) is MoDLlamaForCausalLM
    code = folder / file
    marker = tmp_path / "ran"
    if change == "edited":
        code.write_text(f"{code.read_text()}\nopen({str(marker)!r}, 'w')\n")
    elif change == "missing":
        code.unlink()
    else:
        (folder / "other.py").write_text(f"open({str(marker)!r}, 'w')\n")
        edit_config(folder, auto_map={"AutoConfig": "other.MoDLlamaConfig"})
    named = "modeling_mod.py" if change == "another module" else file
    with pytest.raises(ValueError, match=f"{named}: is not the modelling file of this release"):
        load_huggingface(folder)
    assert not marker.exists()


def test_an_export_of_an_earlier_release_is_to_be_made_again(
    models, tmp_path, text, monkeypatch, capsys
):
    """Its code was one file."""
    folder = shutil.copytree(models[2], tmp_path / "export")
    for file in FILES:
        (folder / file.name).unlink()
    (folder / "modeling_mod.py").write_text("class MoDLlamaForCausalLM:\n    pass\n")
    assert run_tool(monkeypatch, "evaluate.py", "--load", folder, "--perplexity", text) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {folder}/modeling_mod.py: is not the modelling file of this")
    assert "export the run again" in said
    assert said.count("\n") == 1


def test_trust_that_would_be_ignored_is_refused(models, text):
    with pytest.raises(ValueError, match="--trust-remote-code: .* is a Megatron checkpoint"):
        Request(str(models[1]), perplexity=str(text), trust_remote_code=True)


def test_an_export_names_no_code_that_is_not_in_it(models, tmp_path):
    folder = shutil.copytree(models[0], tmp_path / "hf")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "theirs.Model"})
    convert.hf_to_megatron(folder, tmp_path / "base")
    convert.megatron_to_hf(tmp_path / "base", tmp_path / "back")
    assert "auto_map" not in json.loads((tmp_path / "back" / "config.json").read_text())
    load_model(tmp_path / "back")


READERS = {
    "convert": lambda folder: convert.hf_to_megatron(folder, folder.with_name("out")),
    "judge": load_huggingface,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_names_files_of_its_folder(models, tmp_path, reader, absolute):
    folder = shutil.copytree(models[0], tmp_path / "hf")
    shutil.move(folder / WEIGHTS, tmp_path / "elsewhere.safetensors")
    name = str(tmp_path / "elsewhere.safetensors") if absolute else "../elsewhere.safetensors"
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"elsewhere.safetensors' as a file of its own, which lies out"
    ):
        READERS[reader](folder)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json", "vocab.json"])
def test_a_link_does_not_lead_out_of_the_folder(models, tmp_path, reader, name):
    folder = shutil.copytree(models[0], tmp_path / "hf")
    secret = tmp_path / "secret"
    (folder / name).rename(secret) if name != "vocab.json" else secret.write_text("{}")
    (folder / name).symlink_to(secret)
    with pytest.raises(ValueError) as caught:
        READERS[reader](folder)
    assert f"{folder / name}: is a link to {secret}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_links_of_a_base_or_an_export_do_not_either(models, tmp_path, text, monkeypatch, capsys):
    base = shutil.copytree(models[1], tmp_path / "base")
    (tmp_path / "secret").write_text("{}")
    (base / "huggingface" / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"vocab.json: is a link to"):
        convert.megatron_to_hf(base, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    export = shutil.copytree(models[2], tmp_path / "export")
    (export / "notes.md").symlink_to(tmp_path / "secret")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "What is two and two?", "completion": "Four."}\n')
    asked = ("--load", export, "--data", data, "--capacity", "1", "--curve", "--save")
    assert run_tool(monkeypatch, "calibrate_router.py", *asked, tmp_path / "new") == 2
    assert f"error: {export / 'notes.md'}: is a link to" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_hugging_faces_own_cache_is_read(models, tmp_path):
    """A snapshot's files are links to blobs, and blobs may be links to those of all models."""
    model = tmp_path / "hub" / "models--somebody--tiny"
    snapshot, blobs = model / "snapshots" / "abc", model / "blobs"
    shared = tmp_path / "hub" / "blobs" / "aa"
    for folder in (snapshot, blobs, shared):
        folder.mkdir(parents=True)
    for number, path in enumerate(models[0].iterdir()):
        blob = blobs / f"{number}"
        if path.name == WEIGHTS:
            shutil.copyfile(path, shared / ("a" * 64))
            blob.symlink_to(Path("../../blobs/aa") / ("a" * 64))
        else:
            shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    link = tmp_path / "latest"
    link.symlink_to(snapshot)
    for folder in (snapshot, link):
        load_huggingface(folder)
    convert.hf_to_megatron(link, tmp_path / "base")
    other = tmp_path / "hub" / "models--somebody--else" / "blobs"
    other.mkdir(parents=True)
    shutil.copyfile(models[0] / WEIGHTS, other / "1")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(other / "1")
    with pytest.raises(ValueError, match="is a link to"):
        HFReader(snapshot)
