"""PEFT's adapters: read as ``peft`` means them, or refused by the field; written so that it loads
them."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_mod.config.lora import TARGETS
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.hf_reader import read_config
from megatron_mod.conversion.peft import module_name, read_peft, write_peft
from megatron_mod.evaluation.huggingface import load_model
from tests.helpers import tiny
from tests.helpers.adapters import CONFIG, SETTINGS, WEIGHTS, save_adapter

peft = pytest.importorskip("peft", reason="needs the 'test' extra")
A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return tiny.save_llama(tmp_path_factory.mktemp("model") / "hf", num_key_value_heads=2)


@pytest.fixture(scope="module")
def arch(hf):
    return family_of(config := read_config(hf)).architecture_of(config)


@pytest.fixture(scope="module")
def saved(hf, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", hf, lora_dropout=0.1)


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


MEANT = {  # what peft is told: what of it is meant
    "names": ({}, SETTINGS),
    "parts of names": ({"target_modules": ["mlp.down_proj", "self_attn.q_proj"]}, SETTINGS),
    "whole names": (
        {"target_modules": [module_name(2, "up_proj"), module_name(0, "up_proj")]},
        replace(SETTINGS, targets=("up_proj",), layers=(0, 2)),
    ),
    "an expression": (
        {"target_modules": r"model\.layers\.[13]\..*\.(q|down)_proj"},
        replace(SETTINGS, layers=(1, 3)),
    ),
    "all-linear": ({"target_modules": "all-linear"}, replace(SETTINGS, targets=tuple(TARGETS))),
    "but some": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*v_proj|.*layers\.0\..*"},
        replace(SETTINGS, targets=("q_proj",), layers=(1, 2, 3)),
    ),
    "layers": (
        {"layers_to_transform": [3, 1], "layers_pattern": "layers"},
        replace(SETTINGS, layers=(1, 3)),
    ),
    "a layer": ({"layers_to_transform": 2}, replace(SETTINGS, layers=(2,))),
    "rank-stabilised": ({"use_rslora": True}, replace(SETTINGS, alpha=6 * math.sqrt(4))),
    "begun otherwise": (
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
        replace(SETTINGS, dropout=0.1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MEANT)
def test_what_peft_wrote_is_read_as_it_means_it(hf, arch, tmp_path, case):
    told, meant = MEANT[case]
    folder = save_adapter(tmp_path / "adapter", hf, **told)
    settings, adapters = read_peft(folder, arch)
    assert settings == meant
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hf), folder)
    modules = theirs.get_submodule("base_model.model")
    for layer, own in adapters.items():
        for target in settings.targets:
            delta = modules.get_submodule(module_name(layer, target)).get_delta_weight("default")
            ours = settings.scale * own[f"{target}.b"] @ own[f"{target}.a"]
            torch.testing.assert_close(ours, delta)
    adapted = [n for n, m in modules.named_modules() if hasattr(m, "get_delta_weight")]
    assert len(adapted) == len(settings.targets) * len(settings.layers)


def test_what_is_written_peft_loads(hf, arch, saved, tmp_path):
    settings, adapters = read_peft(saved, arch)
    write_peft(tmp_path / "again", settings, adapters, base=hf)
    assert {name: t.tolist() for name, t in load_file(tmp_path / "again" / WEIGHTS).items()} == {
        name: t.tolist() for name, t in load_file(saved / WEIGHTS).items()
    }
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = [
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hf), folder)(ids).logits
        for folder in (saved, tmp_path / "again")
    ]
    assert torch.equal(*logits)
    assert read_peft(tmp_path / "again", arch)[0] == settings
    assert peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "again") is not None


def test_names_may_hold_the_adapters(arch, saved, adapter):
    """As in the state of a model that was not saved by ``save_pretrained``."""
    tensors = load_file(adapter / WEIGHTS)
    named = {name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}
    save_file(named, adapter / WEIGHTS)
    (first, theirs), (again, ours) = read_peft(saved, arch), read_peft(adapter, arch)
    assert first == again
    assert all(torch.equal(t, ours[k][n]) for k, own in theirs.items() for n, t in own.items())


def test_a_half_precision_adapter_becomes_fp32(arch, adapter):
    tensors = {name: t.bfloat16() for name, t in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)
    found = read_peft(adapter, arch)[1][1]["q_proj.a"]
    assert found.dtype == torch.float32
    assert torch.equal(found, tensors[A].float())


REFUSED = [  # field, value, what the message says of it
    ("peft_type", "LOHA", "only 'LORA' is read"),
    ("peft_type", None, "only 'LORA' is read"),
    ("task_type", "SEQ_CLS", "no adapter of a causal language model"),
    ("bias", "all", "changes the model's biases"),
    ("bias", "lora_only", "changes the model's biases"),
    ("lora_bias", True, "its B has a bias"),
    ("use_dora", True, "DoRA's magnitudes"),
    ("fan_in_fan_out", True, "transposed"),
    ("modules_to_save", ["lm_head"], "replaces whole modules"),
    ("rank_pattern", {"q_proj": 2}, "one for all"),
    ("alpha_pattern", {"q_proj": 2}, "one for all"),
    ("target_parameters", ["mlp.experts.weight"], "no linear's"),
    ("trainable_token_indices", [3], "changes the embedding"),
    ("megatron_config", {"x": 1}, "one of Megatron's own layers"),
    ("use_qalora", True, "is not known here"),
    ("layer_replication", [[0, 2]], "is not known here"),
    ("alora_invocation_tokens", [1], "is not known here"),
    ("of_tomorrow", 1, "is not known here"),
    ("init_lora_weights", "pissa", "took a part of the frozen weights"),
    ("init_lora_weights", "olora", "took a part of the frozen weights"),
    ("target_modules", ["q_proj", "lm_head"], "adapts lm_head"),
    ("target_modules", ["embed_tokens", "lm_head"], "adapts model.embed_tokens and lm_head"),
    ("target_modules", r".*", "adapts model.embed_tokens and lm_head"),
    ("target_modules", ["q_proj", "c_attn"], "'c_attn' is no projection"),
    ("target_modules", ["q_proj", "layers.9.mlp.up_proj"], "is no projection of this model's 4"),
    ("target_modules", r"model\.layers\.9\..*", "another one"),
    ("target_modules", r".*layers\.(1.*q_proj|2.*k_proj)", "adapts q_proj in layer 1 and k_proj"),
    ("target_modules", "(", "is no regular expression"),
    ("target_modules", "a{99999999999}", "is no regular expression"),
    ("target_modules", [], "no projections"),
    ("target_modules", None, "is missing"),
    ("target_modules", 5, "must be"),
    ("target_modules", [5], "must be"),
    ("exclude_modules", r".*layers\.1\.mlp.*", "adapts q_proj, down_proj in layer 0 and q_proj"),
    ("layers_to_transform", [2, 7], "this model has layers 0 to 3, not [7]"),
    ("layers_to_transform", [-1], "this model has layers 0 to 3"),
    ("layers_to_transform", "all", "must be"),
    ("layers_to_transform", [1.5], "must be"),
    ("r", 0, "must be"),
    ("r", True, "must be"),
    ("r", None, "is missing"),
    ("r", 8, "by r = 8 and this model"),
    ("lora_alpha", "6", "must be"),
    ("lora_alpha", float("nan"), "must be"),
    ("lora_alpha", 0, "must be"),
    ("lora_dropout", 1.0, "must be"),
    ("use_rslora", "yes", "must be"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_a_field_that_cannot_be_carried_is_named(arch, adapter, field, value, message):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError) as caught:
        read_peft(adapter, arch)
    said = str(caught.value)
    assert message in said
    assert field in said or field == "r"


def test_layers_go_with_names(arch, adapter):
    config = json.loads((adapter / CONFIG).read_text())
    changes = {"target_modules": ".*q_proj", "layers_to_transform": [1]}
    (adapter / CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match="layers_to_transform = .*goes with a list"):
        read_peft(adapter, arch)
    changes = {"layers_to_transform": [1], "layers_pattern": ["h", "blocks"]}
    (adapter / CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match="layers_pattern = .*'blocks'.*belongs to another"):
        read_peft(adapter, arch)


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"")


def linked(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


DAMAGED = {
    "missing": (lambda f: edit(f, lambda t: t.pop(A)), f"1 tensors are missing: {A[:-7]}"),
    "too many": (
        lambda f: edit(f, lambda t: t.update({A.replace("q_proj", "k_proj"): t[A].clone()})),
        "1 tensors have no place in the adapters",
    ),
    "saved embedding": (
        lambda f: edit(f, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)})),
        "base_model.model.lm_head.weight",
    ),
    "of another model": (
        lambda f: edit(f, lambda t: t.update({A: torch.ones(4, 48)})),
        "shape (4, 48) instead of (4, 32)",
    ),
    "of one dimension": (lambda f: edit(f, lambda t: t.update({A: torch.ones(32)})), "shape (32,)"),
    "quantised": (
        lambda f: edit(f, lambda t: t.update({A: torch.ones(4, 32, dtype=torch.int8)})),
        "dtype I8 is not supported",
    ),
    "NaN": (lambda f: edit(f, lambda t: t[A].fill_(math.nan)), f"{A} holds NaN or infinity"),
    "infinite": (lambda f: edit(f, lambda t: t[A].fill_(math.inf)), f"{A} holds NaN or infinity"),
    "twice": (
        lambda f: edit(f, lambda t: t.update({A.replace("A.w", "A.default.w"): t[A].clone()})),
        f"{A}: is {A.replace('A.w', 'A.default.w')} again",
    ),
    "cut short": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]),
        "not a whole safetensors file",
    ),
    "pickled": (pickled, "adapter_model.bin is a pickle, which is not read"),
    "linked": (linked, "is a link to"),
    "no adapter": (lambda f: (f / CONFIG).unlink(), f"has no {CONFIG}"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), f"{CONFIG}: not valid JSON"),
    "no object": (lambda f: (f / CONFIG).write_text("[]"), "must hold a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_folder_is_named(arch, adapter, damage):
    change, message = DAMAGED[damage]
    change(adapter)
    with pytest.raises(ValueError) as caught:
        read_peft(adapter, arch)
    assert message in str(caught.value)
    assert str(adapter) in str(caught.value)


def test_what_we_wrote_has_checksums(hf, arch, saved, tmp_path):
    write_peft(tmp_path / "ours", *read_peft(saved, arch), base=hf)
    edit(tmp_path / "ours", lambda tensors: tensors[A].mul_(2))
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: its content is not what was written"):
        read_peft(tmp_path / "ours", arch)


def test_an_adapters_folder_is_no_model(hf, adapter):
    """Not even beside a model's files: Transformers would load the adapter's own base."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(hf / name, adapter / name)
        for read in (read_config, load_model):
            with pytest.raises(ValueError, match=r"holds a PEFT adapter \(adapter_config.json\)"):
                read(adapter)
