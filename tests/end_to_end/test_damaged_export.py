"""An export that is not what was written, wherever it is read."""

from __future__ import annotations

import shutil

import pytest

from megatron_mod.calibration.routed import load_routed
from megatron_mod.calibration.thresholds_file import write_thresholds
from megatron_mod.checkpoint.export_checksums import FILE
from megatron_mod.conversion import convert
from megatron_mod.evaluation.huggingface import load_huggingface, load_model
from megatron_mod.parallel.topology import Topology
from tests.helpers.broken import edit_config, put
from tests.helpers.faults import Flip
from tests.helpers.runs import Trainer

pytestmark = pytest.mark.usefixtures("single_process")
CHANGED = "the checkpoint is damaged"
REMEDY = "If it was changed on purpose, remove"
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    """With a run's export, and one of the base alone."""
    trainer = Trainer(tmp_path_factory.mktemp("exports"))
    trainer.train(trainer.folder / "run", train__steps=2)
    convert.megatron_to_hf(trainer.folder / "run", trainer.folder / "export")
    convert.megatron_to_hf(trainer.base, trainer.folder / "dense")
    convert.export_routers(trainer.folder / "run", trainer.folder / "routers")
    return trainer


@pytest.fixture
def copy(trainer, tmp_path):
    return lambda name: shutil.copytree(trainer.folder / name, tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", FILE])
def test_a_flipped_bit_is_found_and_its_file_named(copy, name):
    folder = copy("export")
    Flip(name, (folder / name).stat().st_size - 2, 0).apply(folder)
    for load in (load_model, load_huggingface):
        with pytest.raises(ValueError) as caught:
            load(folder)
        assert f"{folder / name}: " in str(caught.value)
        assert REMEDY in str(caught.value)


def test_it_is_neither_converted_nor_trained_on_nor_started_from(trainer, copy, tmp_path):
    put(dense := copy("dense"), WEIGHT, 1.0)
    message = f"{dense}/model.safetensors: .*{CHANGED}"
    with pytest.raises(ValueError, match=message):
        convert.hf_to_megatron(dense, tmp_path / "base")
    assert not (tmp_path / "base").exists()
    with pytest.raises(ValueError, match=message):
        trainer.train(tmp_path / "run", model__checkpoint=None, model__hf_path=dense)
    put(routers := copy("routers"), "model.layers.2.router.weight", 1.0)
    with pytest.raises(ValueError, match=f"{routers}/model.safetensors: .*{CHANGED}"):
        convert.megatron_to_hf(trainer.base, tmp_path / "out", routers_path=routers)


def test_what_else_is_wrong_is_said_too(copy):
    edit_config(folder := copy("export"), intermediate_size=128)
    with pytest.raises(
        ValueError, match=f"shape.*{folder}/config.json: .*{REMEDY} {folder}/{FILE}"
    ):
        load_model(folder)


def test_what_was_changed_on_purpose_is_read_without_the_checksums(copy):
    put(folder := copy("export"), WEIGHT, 1.0)
    (folder / FILE).unlink()
    load_huggingface(folder)


@pytest.mark.parametrize("in_place", [True, False])
def test_calibrated_thresholds_are_what_was_written(copy, tmp_path, in_place):
    folder = copy("export")
    settings = {"max_length": 64, "batch_size": 2, "pooling": None, "dtype": "float32"}
    model = load_routed(folder, Topology(tensor=1, pipeline=1, data=1), **settings)
    save = None if in_place else tmp_path / "new"
    written = write_thresholds(model, [0.25, 0.75], save=save, add=lambda folder: None)
    assert list(load_model(written).config.routing["threshold"]) == [0.25, 0.75]
    put(written, WEIGHT, 1.0)
    with pytest.raises(ValueError, match=CHANGED):
        load_model(written)
