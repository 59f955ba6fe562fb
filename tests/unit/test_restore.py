"""A model is run as it was trained, where the command line says nothing and the machine can."""

from __future__ import annotations

import pytest

from megatron_mod.parallel.topology import ONE_RANK
from tests.helpers.runs import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory, single_process):
    """The source of a small run, and the fields of its manifest."""
    from megatron_mod.checkpoint.manifest import read_manifest
    from megatron_mod.conversion.source import open_source

    trainer = Trainer(tmp_path_factory.mktemp("trainer"))
    trainer.train(trainer.folder / "run", train__steps=1)
    source = open_source(trainer.folder / "run")
    return source, read_manifest(source.step)


@pytest.mark.parametrize(
    ("ran", "possible", "asked", "runs"),
    [
        ("local", "transformer_engine", None, "local"),
        ("transformer_engine", "transformer_engine", None, "transformer_engine"),
        ("transformer_engine", "local", None, "local"),
        ("transformer_engine", "transformer_engine", "local", "local"),
        (None, "transformer_engine", None, "local"),  # a release that did not record it
    ],
)
def test_the_back_end_is_what_training_ran(trained, monkeypatch, ran, possible, asked, runs):
    from megatron_mod.conversion import restore

    source, manifest = trained
    assert manifest["implementation"] == "local"  # there is no GPU in this test's training
    recorded = {**manifest, "implementation": ran}
    if ran is None:
        del recorded["implementation"]
    build, built = restore.build_model, []

    def build_local(*args, implementation, **kwargs):
        built.append(implementation)
        return build(*args, implementation="local", **kwargs)

    monkeypatch.setattr(restore, "read_manifest", lambda step: recorded)
    monkeypatch.setattr(restore, "choose_implementation", lambda: possible)
    monkeypatch.setattr(restore, "build_model", build_local)
    restore.restore_model(source, ONE_RANK, implementation=asked)
    assert built == [runs]
