"""A PEFT adapter in Megatron's layers beside ``peft``'s own on Hugging Face's model."""

from __future__ import annotations

import pytest
import torch

from megatron_mod.conversion.peft import module_name, read_peft
from megatron_mod.conversion.source import open_base
from megatron_mod.model.trainable import LORA
from megatron_mod.routing.config import NO_ROUTERS
from tests.distributed import cases
from tests.distributed.test_granularities import make_case
from tests.helpers import tiny
from tests.helpers.adapters import save_adapter
from tests.helpers.exported import load, relative
from tests.helpers.ranks import run_ranks

peft = pytest.importorskip("peft", reason="needs the 'test' extra")
EXACT = 1e-4


def made(folder, kind: str, changes: dict, **adapter) -> tuple:
    hf, base, samples, _ = make_case(folder, kind, changes)
    settings = {"target_modules": "all-linear", "use_rslora": True, **adapter}
    return hf, base, save_adapter(folder / "adapter", hf, **settings), samples


@pytest.fixture(scope="module")
def case(tmp_path_factory, single_process):
    """Grouped queries and an adapter on every projection of every layer."""
    return made(tmp_path_factory.mktemp("adapters"), "llama", tiny.LLAMAS["odd_vocabulary"])


def question(base, adapter, samples: list, **topology: object) -> tuple:
    """What ``cases.gradients`` is asked about a PEFT folder's adapters in a dense model."""
    settings, adapters = read_peft(adapter, open_base(base).arch)
    asked = cases.Asked(NO_ROUTERS, lora=settings, adapters=adapters, trained=(LORA,))
    return base, samples, {}, [{"logits": True, **topology}], [asked]


def check(found: dict, hf, adapter, samples: list) -> None:
    (found,) = found.values()
    model = peft.PeftModel.from_pretrained(load(hf), adapter, is_trainable=True)
    summed, num_labels = 0.0, sum(sample.num_labels for sample in samples)
    for sample, ours in zip(samples, found["logits"], strict=True):
        ids = torch.tensor([sample.ids])
        theirs = model(ids).logits[0]
        assert relative(ours, theirs.detach()) < EXACT
        labels = ids[0].masked_fill(~torch.tensor(sample.labelled), -100)[1:]
        summed += torch.nn.functional.cross_entropy(theirs[:-1], labels, reduction="sum")
    (summed / num_labels).backward()
    for (layer, name), ours in found["gradients"].items():
        _, target, matrix = name.split(".")
        module = model.base_model.model.get_submodule(module_name(layer, target))
        theirs = getattr(module, f"lora_{matrix.upper()}")["default"].weight.grad
        assert theirs.any()
        assert relative(ours, theirs) < EXACT, (layer, name)
    theirs = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(found["gradients"]) == len(theirs)


def test_logits_and_gradients_equal_pefts(case, single_process):
    hf, base, adapter, samples = case
    check(cases.gradients(*question(base, adapter, samples)), hf, adapter, samples)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_of_families_with_more_in_their_projections(family, tmp_path, single_process):
    """Biases on query, key and value; a norm on each head's query and key."""
    some = {"target_modules": ["k_proj", "o_proj", "up_proj"], "layers_to_transform": [1, 3]}
    hf, _, adapter, samples = made(tmp_path, *tiny.FAMILIES[family], **some)
    check(cases.gradients(*question(hf, adapter, samples)), hf, adapter, samples)


@pytest.mark.slow
def test_on_two_ranks_that_share_each_layer(case, tmp_path):
    hf, base, adapter, samples = case
    asked = question(base, adapter, samples, tensor=2)
    for found in run_ranks(cases.gradients, *asked, world=2, folder=tmp_path):
        check(found, hf, adapter, samples)
