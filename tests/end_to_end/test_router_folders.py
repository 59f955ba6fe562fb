"""Routers of the published code and of ours, in both converters and in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mod.conversion import convert
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.hf_reader import read_config
from megatron_mod.conversion.routers import (
    PUBLISHED,
    read_routers,
    read_step,
    write_published,
    write_step,
)
from megatron_mod.conversion.source import open_source
from megatron_mod.routing.config import RoutingConfig
from tests.helpers.runs import Trainer

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture
def published(tmp_path):
    """A folder as the published code saves its routers."""
    return save_published(tmp_path / "published")


def save_published(folder: Path, *, layers=(1, 2), width=32, **changes: object) -> Path:
    folder.mkdir()
    config = {
        "model_type": "llama", "num_hidden_layers": 4, "granularity": "attn_sequence",
        "is_mod": [layer in layers for layer in range(4)], "threshold": 0.5,
        "mod_capacity": None, "gradient_scale": 0.0, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(2)
    tensors = {
        f"model.layers.{layer}.router.weight": torch.randn(1, width, generator=generator)
        for layer in layers
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_published_routers_reach_the_export_by_both_converters(trainer, published, tmp_path):
    convert.hf_to_megatron(trainer.hf, tmp_path / "routed", routers_path=published)
    convert.megatron_to_hf(tmp_path / "routed", tmp_path / "one")
    convert.megatron_to_hf(trainer.base, tmp_path / "two", routers_path=published)
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    weights = load_file(one)
    for name, weight in load_file(published / "model.safetensors").items():
        assert torch.equal(weights[name], weight)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["routing"]["layers"] == [1, 2]
    assert config["routing"]["pooling"] == "all"


def test_training_starts_from_them(trainer, published, tmp_path):
    settings = {"train__steps": 0, "model__routers": published}
    trainer.train(tmp_path / "run", **settings)
    weights = load_file(published / "model.safetensors")
    source = open_source(tmp_path / "run")
    _, found = read_routers(tmp_path / "run", source.base.arch)
    for layer, weight in found.items():
        assert torch.equal(weight["router.weight"], weights[f"model.layers.{layer}.router.weight"])
    with pytest.raises(ValueError, match=r"router.threshold = 0.6: the routers in .* have 0.5"):
        trainer.train(tmp_path / "other", **settings, router__threshold=0.6)


def test_training_starts_from_those_beside_a_base(trainer, published, tmp_path):
    convert.hf_to_megatron(trainer.hf, tmp_path / "routed", routers_path=published)
    trainer.train(tmp_path / "run", train__steps=0, model__checkpoint=tmp_path / "routed")
    _, found = read_routers(tmp_path / "run", open_source(tmp_path / "run").base.arch)
    assert all(weight["router.weight"].any() for weight in found.values())


def test_ours_are_written_as_the_published_code_does(trainer, tmp_path):
    trainer.train(tmp_path / "run", train__steps=2)
    convert.export_routers(tmp_path / "run", tmp_path / "published")
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    assert config["is_mod"] == [False, True, True, False]
    assert (config["granularity"], config["threshold"]) == ("attn_sequence", 0.5)
    weights = load_file(tmp_path / "published" / "model.safetensors")
    assert set(weights) == {f"model.layers.{layer}.router.weight" for layer in (1, 2)}
    convert.megatron_to_hf(tmp_path / "run", tmp_path / "one")
    convert.megatron_to_hf(trainer.base, tmp_path / "two", routers_path=tmp_path / "published")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


OF_EACH = {  # what decides differently from granularity to granularity, and is not the default
    "attn_sequence": {"pooling": "prompt", "scope": "model"},
    "mlp_sequence": {"pooling": "all"},
    "block_sequence": {"capacity": (0.25, 0.75)},
    "attn_token": {"keys_values": "selected", "training_compute": "sparse"},
    "mlp_token": {"capacity_warmup_fraction": 0.1},
    "block_token": {"keys_values": "all", "threshold": 0.25, "capacity_loss_weight": 2.0},
}


@pytest.mark.parametrize("granularity", PUBLISHED)
def test_ours_come_back_as_they_were(trainer, tmp_path, granularity):
    settings = {"layers": (1, 2), "capacity": (0.5, 0.5), **OF_EACH[granularity]}
    routing = RoutingConfig(granularity, **settings)
    weights = {layer: {"router.weight": torch.randn(1, 32)} for layer in routing.layers}
    (tmp_path / "routers").mkdir()
    write_published(tmp_path / "routers", routing, weights, config := read_config(trainer.hf))
    found, tensors = read_routers(tmp_path / "routers", family_of(config).architecture_of(config))
    assert found == routing
    for layer, own in weights.items():
        assert torch.equal(tensors[layer]["router.weight"], own["router.weight"])


@pytest.mark.parametrize("granularity", PUBLISHED)
def test_the_published_codes_are_read(trainer, tmp_path, granularity):
    folder = save_published(tmp_path / "published", granularity=granularity)
    arch = family_of(config := read_config(trainer.hf)).architecture_of(config)
    routing, _ = read_routers(folder, arch)
    assert routing.granularity == granularity
    assert routing.pooling == ("all" if granularity.endswith("sequence") else None)


MALFORMED = {
    "is_mod": [True, 1, "true", {}, [], [False] * 4, ["yes"] * 4, [None, True, True, False], 5],
    "granularity": [5, ["attn_token"], {}],
    "threshold": ["half", -0.1, 2, [0.5], float("nan"), True],
    "mod_capacity": ["all", [0.5], [0.5, 0.5, "x", 0.5], {}, 3],
    "gradient_scale": ["1", [1.0], float("inf")],
    "num_hidden_layers": ["four", 4.5, 0, [4]],
    "megatron_mod": ["x", {"pooling": "some"}, {"keys_values": "all"}, {"scope": 1}],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in MALFORMED for value in MALFORMED[field]]
)
def test_a_malformed_published_config_is_one_message(trainer, tmp_path, field, value):
    folder = save_published(tmp_path / "published", **{field: value})
    with pytest.raises(ValueError, match=rf"config.json: {field}\b"):
        convert.megatron_to_hf(trainer.base, tmp_path / "export", routers_path=folder)


WRONG = {
    "shape (1, 16) instead of (1, 32)": {"width": 16},
    "routers of layers [1, 2], but its config routes layers [1]": {
        "is_mod": [False, True, False, False]
    },
    "granularity = 'attn_head' is not supported": {"granularity": "attn_head"},
    "is_mod has 4 values for 6 layers": {"num_hidden_layers": 6},
}


@pytest.mark.parametrize("message", WRONG)
def test_routers_that_do_not_fit_are_refused(trainer, tmp_path, message):
    folder = save_published(tmp_path / "published", **WRONG[message])
    with pytest.raises(ValueError) as caught:
        convert.megatron_to_hf(trainer.base, tmp_path / "export", routers_path=folder)
    assert message in str(caught.value)
    assert not (tmp_path / "export").exists()


def test_a_folder_without_routers_is_refused(trainer, tmp_path):
    arch = family_of(config := read_config(trainer.hf)).architecture_of(config)
    with pytest.raises(ValueError, match="has no is_mod"):
        read_routers(trainer.hf, arch)
    with pytest.raises(ValueError, match="holds no routers"):
        read_routers(trainer.base, arch)
    with pytest.raises(ValueError, match="holds no routers"):
        convert.export_routers(trainer.base, tmp_path / "published")
    shutil.rmtree(tmp_path)


def test_a_step_without_what_its_manifest_names_is_refused(trainer, tmp_path):
    routing = RoutingConfig("attn_token", (1, 2), (0.5, 0.5), bias=True)
    added = {layer: {"router.weight": torch.randn(1, 32)} for layer in routing.layers}
    write_step(tmp_path / "step", routing, added, base=str(trainer.base), fingerprint="")
    with pytest.raises(ValueError, match=r"routers do not match its manifest: .*1\.router\.bias"):
        read_step(tmp_path / "step", routing)
    with pytest.raises(ValueError, match=r"routers do not match its manifest: .*2\.router"):
        read_step(tmp_path / "step", RoutingConfig("attn_token", (1,), (0.5,)))
