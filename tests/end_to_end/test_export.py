"""The exported folder: what it needs, what it refuses, what survives saving again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache

from megatron_mod import hf
from tests.helpers import formula
from tests.helpers.exported import ROUTED, Exports, load, pad


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Exports(tmp_path_factory.mktemp("export"), plain=False)


@pytest.fixture(scope="module")
def export(case):
    return case.export("attn_sequence")


def test_padding_would_change_decisions_if_it_counted(case):
    """A control: equality with the formula on padded batches can tell whether padding is pooled."""
    ids, mask = pad(case.prompts, "right")
    model = case.model("attn_sequence")
    with torch.no_grad():
        masked, counted = (
            model(ids, attention_mask=m, use_cache=True).past_key_values for m in (mask, None)
        )
    for layer in ROUTED:
        kept = [cache.layers[layer].choices["attn"].keep for cache in (masked, counted)]
        assert not torch.equal(*kept)


def test_a_layer_everybody_skips_holds_nothing(export):
    model = load(export)
    model.model.layers[0].logit_borders["attn"] = float("inf")
    with torch.no_grad():
        cache = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    assert cache.layers[0].keys is None
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("name", formula.SCHEMES)
def test_routers_stay_in_float32_when_the_model_is_bfloat16(case, name):
    model = load(case.export(name), dtype=torch.bfloat16)
    for parameter_name, parameter in model.named_parameters():
        kept = torch.float32 if ".router." in parameter_name else torch.bfloat16
        assert parameter.dtype == kept, parameter_name
    assert len([n for n, _ in model.named_parameters() if "stand_in" in n or "router" in n]) == (
        5 * len(model.config.places)
    )
    ids, mask = pad(case.prompts, "left")
    made = model.generate(ids, attention_mask=mask, max_new_tokens=3, eos_token_id=None)
    assert made.shape == (len(ids), ids.shape[1] + 3)


def test_saving_again_keeps_everything(case, export, tmp_path):
    model = load(export)
    model.save_pretrained(tmp_path)
    ids, mask = pad(case.prompts, "right")
    with torch.no_grad():
        first = model(ids, attention_mask=mask).logits
        again = load(tmp_path)(ids, attention_mask=mask).logits
    assert torch.equal(first, again)
    for file in hf.FILES:
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    maps = [json.loads((f / "config.json").read_text())["auto_map"] for f in (export, tmp_path)]
    assert maps[0] == maps[1]


def test_the_file_that_transformers_opens_names_all_others(export):
    """Transformers 4.57 takes along what that file imports, not what is imported in turn."""
    named = re.findall(r"^from \.(\w+) import", (export / f"{hf.MODULE}.py").read_text(), re.M)
    assert sorted([hf.MODULE, *named]) == [file.stem for file in hf.FILES]
    config = json.loads((export / "config.json").read_text())
    assert {name.split(".")[0] for name in config["auto_map"].values()} == {hf.MODULE}


def test_a_used_cache_of_another_model_is_refused(case, export):
    ids = torch.tensor([case.prompts[0]])
    with torch.no_grad():
        cache = case.dense(ids, past_key_values=DynamicCache()).past_key_values
        with pytest.raises(ValueError, match="did not fill"):
            load(export)(ids, past_key_values=cache)


WITHOUT_PACKAGE = """
import sys, torch
sys.path = [p for p in sys.path if p not in ("", ".")]
try:
    import megatron_mod
except ImportError:
    pass
else:
    sys.exit("megatron_mod can be imported here, so this shows nothing")
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
made = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, eos_token_id=None)
print(made.shape)
"""


def _isolated(code: str, *arguments: object, folder) -> subprocess.CompletedProcess:
    """Run code where neither this repository nor an editable install of it can be found."""
    block = folder / "sitecustomize.py"
    block.write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('megatron_mod', 'megatron'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_MODULES_CACHE": str(folder / "hf")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_the_folder_works_without_this_package(export, tmp_path):
    done = _isolated(WITHOUT_PACKAGE, export, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 6])" in done.stdout


def test_without_trust_remote_code_it_is_refused(export, tmp_path):
    code = WITHOUT_PACKAGE.replace(", trust_remote_code=True", "")
    done = _isolated(code, export, folder=tmp_path)
    assert done.returncode != 0
    assert "trust_remote_code" in done.stderr


def test_config_is_written_for_both_releases(export):
    config = json.loads((export / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["model_type"] == "mod_llama"
