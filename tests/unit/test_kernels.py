"""Fused kernels are used where they work, never where they do not, and it is said whose run."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from megatron_mod.parallel import optional
from tests.helpers.runs import Trainer


def package(folder, name: str, text: str = "") -> None:
    path = folder.joinpath(*name.split("."), "__init__.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("packages", "reason"),
    [
        (["apex"], "another package of that name"),
        (["apex", "apex.optimizers"], "without its CUDA kernels"),
        (["apex", "apex.optimizers", "amp_C"], None),
        ([], None),
    ],
)
def test_which_apex_it_is_is_told_without_importing_it(tmp_path, monkeypatch, packages, reason):
    for name in packages:
        package(tmp_path, name, "raise SystemExit")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = optional.why_not_apex()
    assert found == reason or reason in found


@pytest.fixture
def afresh(tmp_path, monkeypatch):
    """The packages that are guarded, as those of a folder and not imported yet."""
    for name in list(sys.modules):
        if name.partition(".")[0] in optional.GUARDED:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not is_guard(f)])
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in list(sys.modules):
        if name.partition(".")[0] in optional.GUARDED:
            del sys.modules[name]


def is_guard(finder: object) -> bool:
    return isinstance(finder, optional._Guard)


def imports(name: str) -> bool | str:
    try:
        importlib.import_module(name)
    except ImportError as error:
        return str(error)
    return True


def test_a_package_that_cannot_work_fails_as_one_that_is_not_there(afresh):
    package(afresh, "apex", "raise AttributeError('as of another time')")
    package(afresh, "transformer_engine", "raise OSError('libnccl.so.2: cannot open')")
    with pytest.raises(OSError):
        importlib.import_module("transformer_engine")
    optional.guard(has_gpu=True)
    assert "None in sys.modules" in imports("apex")
    assert imports("transformer_engine") == "OSError: libnccl.so.2: cannot open"


@pytest.mark.parametrize("before", [True, False], ids=["imported_before", "imported_later"])
@pytest.mark.parametrize("has_gpu", [True, False])
def test_what_needs_a_gpu_is_there_with_one(afresh, has_gpu, before):
    optimizers = optional.OPTIMIZERS
    for name in ("apex", "apex.optimizers", "amp_C", "transformer_engine", optimizers):
        package(afresh, name)
    package(afresh, "transformer_engine.pytorch", f"from {optimizers} import __name__ as used")
    if before:
        importlib.import_module("transformer_engine.pytorch")
    optional.guard(has_gpu=has_gpu)
    assert imports("transformer_engine.pytorch") is True  # which has its optimizers
    for name in ("apex.optimizers", optimizers):
        assert (imports(name) is True) == has_gpu, name


def test_a_training_says_what_it_runs(single_process, tmp_path, capsys, monkeypatch):
    """What is said is what its model and its optimizer are made of."""
    from megatron_mod.training import kernels, loop

    made = {}
    build = loop.build_optimizer

    def note(chunks, config, **options):
        made["optimizer"], scheduler = build(chunks, config, **options)
        layer = chunks[0].module.decoder.layers[0]
        made["attention"] = layer.self_attention.core_attention
        made["norms"] = layer.input_layernorm
        return made["optimizer"], scheduler

    monkeypatch.setattr(loop, "build_optimizer", note)
    Trainer(tmp_path).train(tmp_path / "run", train__steps=1)
    (inner,) = made["optimizer"].chained_optimizers
    parts = {"attention": made["attention"], "norms": made["norms"], "optimizer": inner.optimizer}
    told = ", ".join(f"{part}: {kernels._whose(type(it))}" for part, it in parts.items())
    backend = torch.distributed.get_backend()
    assert f"\n{told}, communication: {backend}\n" in capsys.readouterr().out
