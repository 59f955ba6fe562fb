"""Hugging Face to Megatron and back, and what is refused."""

from __future__ import annotations

import errno
import io
import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mod.checkpoint import folders
from megatron_mod.checkpoint.folders import new_folder
from megatron_mod.conversion import convert, mappings
from megatron_mod.conversion.families import FAMILIES
from megatron_mod.conversion.hf_reader import HFReader
from megatron_mod.conversion.hf_writer import HFWriter
from megatron_mod.conversion.mappings import QKV
from tests.helpers import tiny

pytestmark = pytest.mark.usefixtures("single_process")


MODELS = {**{n: ("llama", changes) for n, changes in tiny.LLAMAS.items()}, **tiny.FAMILIES}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_returns_every_bit(tmp_path, name, dtype):
    kind, changes = MODELS[name]
    hf = tiny.save_model(tmp_path / "hf", kind, dtype=dtype, **changes)
    convert.hf_to_megatron(hf, tmp_path / "megatron")
    convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    with HFReader(hf) as before, HFReader(tmp_path / "back") as after:
        assert before.names() == after.names()
        for key in before.names():
            assert before.tensor(key).dtype == after.tensor(key).dtype == dtype
            assert torch.equal(before.tensor(key), after.tensor(key)), key


def test_qkv_interleaving_is_megatrons():
    """Row by row as Megatron's attention splits it: each group's queries, its key, its value."""
    row = QKV("qkv", "q", "k", "v", num_query_groups=2, queries_per_group=3)
    size, hidden = 2, 1
    query = torch.arange(6 * size).view(-1, hidden)
    key, value = 100 + torch.arange(2 * size).view(-1, 1), 200 + torch.arange(2 * size).view(-1, 1)
    parts = {"q": query, "k": key, "v": value}

    def rows(start: int, stop: int) -> list[int]:
        read = lambda name, first, last: parts[name][first:last]  # noqa: E731
        return mappings.to_megatron(row, read, 20, start, stop).flatten().tolist()

    merged = [0, 1, 2, 3, 4, 5, 100, 101, 200, 201, 6, 7, 8, 9, 10, 11, 102, 103, 202, 203]
    assert rows(0, 20) == merged
    assert rows(10, 20) == merged[10:], "what the second of two tensor ranks reads"
    assert rows(5, 9) == merged[5:9]
    back = mappings.to_hf(row, torch.tensor(merged).view(-1, 1))
    assert all(torch.equal(back[name], part) for name, part in parts.items())


def test_large_models_are_written_in_shards(tmp_path):
    writer = HFWriter(tmp_path, max_shard_bytes=1000)
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}  # 400 bytes each
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert index["metadata"]["total_size"] == 2000
    with HFReader(tmp_path) as reader:
        for name, tensor in tensors.items():
            assert torch.equal(reader.tensor(name), tensor)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_is_changed_in_weights_and_config(tmp_path, dtype):
    hf = tiny.save_llama(tmp_path / "hf", dtype=torch.float32)
    convert.hf_to_megatron(hf, tmp_path / "megatron", dtype=dtype)
    convert.megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back, original = (load_file(f / "model.safetensors") for f in (tmp_path / "back", hf))
    for name, tensor in original.items():
        assert torch.equal(back[name], tensor.to(getattr(torch, dtype)))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == dtype


def edit_config(folder, *dropped, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in dropped}))


def drop(folder, name):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


def add(folder, name):
    path = folder / "model.safetensors"
    save_file({**load_file(path), name: torch.zeros(3)}, path)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def quantise(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, path)


BROKEN = {
    "no folder": (lambda f: shutil.rmtree(f), "no such folder"),
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "the folder is empty"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no safetensors"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "x.bin"), "is a pickle"),
    "another family": (
        lambda f: edit_config(f, model_type="gpt2"),
        "supported: llama (LlamaForCausalLM), mistral",
    ),
    "another head": (
        lambda f: edit_config(f, architectures=["LlamaForSequenceClassification"]),
        "architectures = ['LlamaForSequenceClassification']",
    ),
    "missing field": (lambda f: edit_config(f, "rms_norm_eps"), "rms_norm_eps is missing"),
    "another activation": (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act = 'gelu'"),
    "attention bias": (lambda f: edit_config(f, attention_bias=True), "attention_bias = True"),
    "rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        "rope type 'yarn'",
    ),
    "missing tensor": (
        lambda f: drop(f, "model.layers.2.mlp.up_proj.weight"),
        "1 tensors are missing: model.layers.2.mlp.up_proj.weight",
    ),
    "left-over tensor": (lambda f: add(f, "model.layers.9.x"), "model.layers.9.x"),
    "wrong shape": (lambda f: edit_config(f, intermediate_size=128), "do not belong together"),
    "wrong heads": (lambda f: edit_config(f, num_key_value_heads=2), "do not belong together"),
    "broken index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "is no index of safetensors",
    ),
    "quantised": (quantise, "dtype F8_E4M3 is not supported"),
    "cut short": (truncate, "not a whole safetensors file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_converted_is_refused_and_nothing_is_left(tmp_path, case):
    breaks, message = BROKEN[case]
    hf = tiny.save_llama(tmp_path / "hf")
    breaks(hf)
    with pytest.raises(ValueError) as caught:
        convert.hf_to_megatron(hf, tmp_path / "out" / "megatron")
    assert message in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


def test_an_existing_output_is_refused_and_untouched(tmp_path):
    hf = tiny.save_llama(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    for call, load in ((convert.hf_to_megatron, hf), (convert.megatron_to_hf, tmp_path / "base")):
        if call is convert.megatron_to_hf:
            convert.hf_to_megatron(hf, load)
        with pytest.raises(ValueError, match="already exists"):
            call(load, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_after_an_interruption_the_same_command_works(tmp_path, monkeypatch):
    hf = tiny.save_llama(tmp_path / "hf")
    out = tmp_path / "out"
    killed = out / ".megatron.incomplete"  # what kill -9 leaves
    (killed / "state").mkdir(parents=True)
    (killed / "state" / "__0_0.distcp").write_text("half")
    (killed / "megatron_mod.json").write_text("{}")
    with pytest.raises(ValueError, match="does not exist"):
        convert.megatron_to_hf(out / "megatron", tmp_path / "export")

    with monkeypatch.context() as context:
        context.setattr(convert, "copy_companions", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert.hf_to_megatron(hf, out / "megatron")
    assert not list(out.glob("*"))
    convert.hf_to_megatron(hf, out / "megatron")
    convert.megatron_to_hf(out / "megatron", tmp_path / "back")
    assert [path.name for path in out.glob("*")] == ["megatron"]


@pytest.fixture(params=["to Megatron", "to Hugging Face"])
def conversion(request, tmp_path):
    """A conversion whose only argument is its output, and about how many bytes it writes."""
    hf = tiny.save_tokenizer(tiny.save_llama(tmp_path / "hf", vocab_size=tiny.VOCAB))
    size = (hf / "model.safetensors").stat().st_size
    if request.param == "to Megatron":
        return partial(convert.hf_to_megatron, hf), size
    convert.hf_to_megatron(hf, tmp_path / "base")
    return partial(convert.megatron_to_hf, tmp_path / "base"), size


def test_room_is_looked_for_before_anything_is_written(conversion, tmp_path, monkeypatch):
    call, size = conversion
    monkeypatch.setattr(folders, "free_bytes", lambda path: size + 2**16)
    with pytest.raises(ValueError, match=rf"needs \d+ bytes and {size + 2**16} are free"):
        call(tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    monkeypatch.setattr(folders, "free_bytes", lambda path: size + 2**21)
    call(tmp_path / "out")


@pytest.mark.parametrize("after", [0, 500, 50_000, 150_000])
def test_a_disk_that_runs_full_on_the_way_is_one_message(conversion, tmp_path, monkeypatch, after):
    call, size = conversion
    assert size > after
    left = [after]

    def write(self, data) -> int:
        left[0] -= len(memoryview(data).cast("B"))
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return io.BufferedWriter.write(self, data)

    monkeypatch.setattr(folders.ChunkedFile, "write", write)
    monkeypatch.setattr(folders, "free_bytes", lambda path: 10**9 if left[0] >= 0 else 0)
    with pytest.raises(ValueError, match=r"out: could not be written: the disk is full"):
        call(tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_two_conversions_into_one_folder_are_refused(tmp_path):
    hf = tiny.save_llama(tmp_path / "hf")
    first = new_folder(tmp_path / "megatron")
    with first, pytest.raises(ValueError, match="another process is writing"):
        convert.hf_to_megatron(hf, tmp_path / "megatron")


def test_exporting_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        convert.megatron_to_hf(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="has no megatron_mod.json"):
        convert.megatron_to_hf(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_family_uses_every_name_once():
    for family in FAMILIES.values():
        arch = family.architecture_of({
            "hidden_act": "silu", "num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 8,
            "num_attention_heads": 2, "vocab_size": 9, "max_position_embeddings": 8,
            "rms_norm_eps": 1e-6, "num_key_value_heads": 2, "moe_intermediate_size": 4,
            "num_experts": 3, "num_experts_per_tok": 2,
        })  # fmt: skip
        rows = family.table(arch)
        for names in ([r.megatron for r in rows], [n for r in rows for n in r.hf]):
            assert len(set(names)) == len(names)


NOT_BUILT = {
    "use_sliding_window = True": ("qwen2", {"use_sliding_window": True}),
    "layer_types holds ['sliding_attention']": (
        "qwen3",
        {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
    ),
    "attention_bias = True": ("qwen3", {"attention_bias": True}),
    "num_key_value_heads is missing": ("mistral", {"num_key_value_heads": ...}),
    "attention_dropout = 0.1": ("mistral", {"attention_dropout": 0.1}),
    "partial_rotary_factor = 0.5": ("qwen2", {"partial_rotary_factor": 0.5}),
    "quantization_config = {'quant_method': 'fp8'}": (
        "llama",
        {"quantization_config": {"quant_method": "fp8"}},
    ),
    "router_jitter_noise = 0.1": ("mixtral", {"router_jitter_noise": 0.1}),
    "num_experts_per_tok = 9: must be at most the number of experts, 8": (
        "mixtral",
        {"num_experts_per_tok": 9, "num_local_experts": 8},
    ),
    "num_experts_per_tok = 1: Megatron's gate cannot normalise": (
        "mixtral",
        {"num_experts_per_tok": 1},
    ),
    "router_aux_loss_coef = -1.0: must be 0 or more": (
        "olmoe",
        {"router_aux_loss_coef": -1},
    ),
    "num_experts_per_tok is missing": ("mixtral", {"num_experts_per_tok": ...}),
    "mlp_only_layers = [1]": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "decoder_sparse_step = 2": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "num_experts = 4: is not num_local_experts = 8": (
        "qwen3_moe",
        {"num_experts": 4, "num_local_experts": 8},
    ),
    "moe_intermediate_size is missing": ("qwen3_moe", {"moe_intermediate_size": ...}),
    "clip_qkv = 8.0": ("olmoe", {"clip_qkv": 8.0}),
}


@pytest.mark.parametrize("message", NOT_BUILT)
def test_what_is_not_built_is_named_by_its_field(tmp_path, message):
    kind, changes = NOT_BUILT[message]
    small = {"num_experts": 8, "moe_intermediate_size": 8} if kind == "qwen3_moe" else {}
    hf = tiny.save_model(tmp_path / "hf", kind, **small)
    dropped = [name for name, value in changes.items() if value is ...]
    edit_config(hf, *dropped, **{k: v for k, v in changes.items() if v is not ...})
    with pytest.raises(ValueError) as caught:
        convert.hf_to_megatron(hf, tmp_path / "megatron")
    assert f"config.json: {message}" in str(caught.value)
