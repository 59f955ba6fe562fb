"""A model is run as it was trained, where the command line says nothing and the machine can."""

from __future__ import annotations

import pytest
import torch

from megatron_mod.parallel.topology import ONE_RANK
from tests.helpers.runs import Trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, single_process):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def trained(trainer):
    """The source of a small run, and the fields of its manifest."""
    from megatron_mod.checkpoint.manifest import read_manifest
    from megatron_mod.conversion.source import open_source

    trainer.train(trainer.folder / "run", train__steps=1)
    source = open_source(trainer.folder / "run")
    return source, read_manifest(source.step)


@pytest.mark.parametrize(
    ("ran", "possible", "asked", "runs"),
    [
        ("local", True, None, "local"),
        ("transformer_engine", True, None, "transformer_engine"),
        ("transformer_engine", False, None, "local"),
        ("transformer_engine", True, "local", "local"),
        (None, True, None, "transformer_engine"),  # not a training's, or of an old release
        (None, False, None, "local"),
    ],
)
def test_the_back_end_is_what_training_ran(
    trained, monkeypatch, capsys, ran, possible, asked, runs
):
    from megatron_mod.conversion import restore

    source, manifest = trained
    assert manifest["implementation"] == "local"  # there is no GPU in this test's training
    recorded = {**manifest, "implementation": ran}
    if ran is None:
        del recorded["implementation"]
    monkeypatch.setattr(restore, "read_manifest", lambda step: recorded)
    built = note_what_is_built(monkeypatch, possible=possible)
    restore.restore_model(source, ONE_RANK, implementation=asked, dtype=torch.bfloat16)
    assert built == [runs]
    said = capsys.readouterr().out
    if ran == "transformer_engine" and not possible:
        assert "Transformer Engine, which cannot work here (no reason); its layers run as" in said
        assert said.count("\n") == 1
    else:
        assert not said


def note_what_is_built(monkeypatch: pytest.MonkeyPatch, *, possible: bool) -> list[str]:
    """The back ends of the models that are built from now on, which all come out as ``local``.

    ``possible``: whether Transformer Engine works here, as far as anybody asks.
    """
    from megatron_mod.conversion import restore
    from megatron_mod.model import specs

    build, built = restore.build_model, []

    def build_local(*args, implementation, **kwargs):
        built.append(implementation)
        return build(*args, implementation="local", **kwargs)

    reason = None if possible else "no reason"
    for module in (specs, restore):
        monkeypatch.setattr(module, "why_not_transformer_engine", lambda: reason)
    monkeypatch.setattr(restore, "build_model", build_local)
    return built


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("possible", [True, False])
def test_a_base_and_stand_ins_run_what_a_training_would(
    trained, monkeypatch, tmp_path_factory, possible, dtype
):
    from megatron_mod.calibration.stand_ins import make_stand_ins
    from megatron_mod.checkpoint.manifest import read_manifest
    from megatron_mod.config.stand_ins import StandInRequest
    from megatron_mod.conversion import restore
    from megatron_mod.conversion.source import open_source

    source, _ = trained
    folder = tmp_path_factory.mktemp("stand_ins")
    text = folder / "text.txt"
    text.write_text("abcd efgh " * 40)
    built = note_what_is_built(monkeypatch, possible=possible)
    request = StandInRequest(
        load=str(source.base.path),
        data=str(text),
        save=str(folder / "made"),
        layers="[1]",
        rank=2,
        dtype=dtype,
    )
    make_stand_ins(request, ONE_RANK)
    chosen = "transformer_engine" if possible and dtype == "bfloat16" else "local"
    assert read_manifest(folder / "made")["implementation"] == chosen
    for load in (source.base.path, folder / "made"):
        restore.restore_model(open_source(load), ONE_RANK, dtype=getattr(torch, dtype))
    assert built == [chosen] * 3


def test_a_training_that_goes_on_elsewhere_says_so(trainer, trained, monkeypatch, capsys):
    from megatron_mod.training import run_folder

    verify = run_folder.verify_checkpoint
    elsewhere = {"implementation": "transformer_engine"}
    monkeypatch.setattr(run_folder, "verify_checkpoint", lambda step: {**verify(step), **elsewhere})
    trainer.train(trainer.folder / "run", train__steps=2)
    said = capsys.readouterr().out
    assert "after step 1 of 2 (on local layers instead of transformer_engine: equal to" in said
