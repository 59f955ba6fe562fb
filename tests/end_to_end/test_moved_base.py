"""A training whose base has moved, or that has saved nothing yet: what the tools say and take."""

from __future__ import annotations

import shutil

import pytest

from megatron_mod.calibration.routed import load_routed
from megatron_mod.checkpoint.manifest import read_manifest
from megatron_mod.config.evaluation import Request
from megatron_mod.config.model_folder import ModelFolder
from megatron_mod.conversion.source import open_source
from megatron_mod.evaluation.load import load_backend
from megatron_mod.evaluation.parity import compare
from megatron_mod.parallel.topology import Topology
from tests.helpers.runs import Trainer

ONE = Topology(tensor=1, pipeline=1, data=1)


@pytest.fixture(scope="module")
def moved(tmp_path_factory, single_process):
    """A trainer, its run, and where the base of it is now."""
    trainer = Trainer(tmp_path_factory.mktemp("moved"))
    run = trainer.folder / "run"
    trainer.train(run, train__steps=1)
    return trainer, run, trainer.base.rename(trainer.folder / "elsewhere")


def test_the_option_that_names_it_is_said(moved):
    trainer, run, _ = moved
    for load in (open_source, lambda run: load_backend(run, ONE, dtype="float32")):
        with pytest.raises(ValueError, match=rf"{trainer.base}: the base .* --base DIR"):
            load(run)


def test_every_tool_takes_it(moved):
    trainer, run, base = moved
    assert open_source(run, base=base).base.path == base
    assert load_backend(run, ONE, dtype="float32", base=str(base)).places
    assert load_routed(run, ONE, dtype="float32", base=str(base)).work.routing
    assert compare(base, trainer.hf, ONE, base=str(base))[0] < 1e-5
    assert compare(run, trainer.hf, ONE, base=str(base))[0] >= 0


def test_where_it_would_be_ignored_it_is_refused(moved, tmp_path):
    trainer, run, base = moved
    assert Request(str(run), perplexity=str(trainer.text), base=str(base)).base == str(base)
    for load in (base, trainer.hf):
        with pytest.raises(ValueError, match="--base .* would be ignored"):
            Request(str(load), perplexity=str(trainer.text), base=str(base))


def test_a_run_that_has_saved_nothing_is_not_taken_for_another_folder(moved, tmp_path):
    shutil.copyfile(moved[1] / "config.yaml", tmp_path / "config.yaml")
    said = "this training has not saved a checkpoint yet"
    assert said in ModelFolder().problem(str(tmp_path))
    with pytest.raises(ValueError, match=said):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match=said):
        open_source(tmp_path)
