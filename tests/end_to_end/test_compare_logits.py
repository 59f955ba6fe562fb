"""tools/compare_logits.py: what passes for the same model, and what does not."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_mod.conversion import convert
from megatron_mod.conversion.routers import write_step
from megatron_mod.conversion.source import open_base
from megatron_mod.routing.config import RoutingConfig
from tests.helpers import tiny
from tests.helpers.broken import edit_tensors
from tests.helpers.tools import run_tool

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, single_process):
    """A model, its base, that in bfloat16, and models of other weights and vocabulary."""
    folder = tmp_path_factory.mktemp("compare")
    settings = {"max_position_embeddings": 2048}
    for name, changes in {"one": {}, "two": {"seed": 1}, "wide": {"vocab_size": 300}}.items():
        hf = tiny.save_llama(folder / name, **{"vocab_size": tiny.VOCAB, **settings, **changes})
        tiny.save_tokenizer(hf)
    convert.hf_to_megatron(folder / "one", folder / "base")
    convert.hf_to_megatron(folder / "one", folder / "half", dtype="bfloat16")
    return folder


def compare(monkeypatch, folders, base: str, hf: str, *more: object) -> int:
    asked = ("--load", folders / base, "--hf-path", folders / hf, *more)
    return run_tool(monkeypatch, "compare_logits.py", *asked)


def test_the_same_model_passes(folders, monkeypatch, capsys, tmp_path):
    assert compare(monkeypatch, folders, "base", "one", "--json", tmp_path / "out.json") == 0
    (figures,) = json.loads((tmp_path / "out.json").read_text())
    assert set(figures) == {"load", "hf_path", "max_rel"}
    assert figures["max_rel"] < 2e-5
    assert not capsys.readouterr().err.count("error")


def test_another_model_fails_and_is_still_reported(folders, monkeypatch, capsys, tmp_path):
    several = ("--load", folders / "base", folders / "base")
    several += ("--hf-path", folders / "two", folders / "one", "--json", tmp_path / "out.json")
    assert run_tool(monkeypatch, "compare_logits.py", *several) == 1
    different, same = json.loads((tmp_path / "out.json").read_text())
    assert different["max_rel"] > 0.1 > same["max_rel"]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    (line,) = said
    assert line.startswith(f"error: {folders / 'base'} and {folders / 'two'} differ by ")
    assert "--tolerance" in line
    assert compare(monkeypatch, folders, "base", "two", "--tolerance", "1e9") == 0


def test_rounding_to_another_dtype_passes_and_can_be_refused(folders, monkeypatch):
    assert compare(monkeypatch, folders, "half", "one") == 0
    assert compare(monkeypatch, folders, "half", "one", "--tolerance", "1e-4") == 1


def test_what_a_training_added_may_be_rounded_too(folders, monkeypatch):
    """An export in bfloat16 holds stand-ins in it, whose fp32 weights a run keeps."""
    draw = torch.Generator().manual_seed(7)
    added = {
        "router.weight": torch.zeros(1, 32),
        "router.bias": torch.tensor([-1.0]),  # all is skipped
        "stand_in.down.weight": 0.1 * torch.randn(2, 32, generator=draw),
        "stand_in.up.weight": torch.randn(32, 2, generator=draw),
        "stand_in.up.bias": torch.randn(32, generator=draw),
    }
    routing = RoutingConfig("attn_token", (1,), capacity=(0.5,), bias=True, stand_in_rank=2)
    base = folders / "half"
    where = {"base": str(base), "fingerprint": open_base(base).fingerprint()}
    write_step(folders / "routed", routing, {1: added}, **where)
    convert.megatron_to_hf(folders / "routed", folders / "export")
    assert compare(monkeypatch, folders, "routed", "export") == 0
    assert compare(monkeypatch, folders, "routed", "export", "--tolerance", "1e-4") == 1


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_tolerance_is_a_number_from_zero_up(folders, monkeypatch, capsys, value):
    assert compare(monkeypatch, folders, "base", "one", f"--tolerance={value}") == 2
    assert "--tolerance" in capsys.readouterr().err


def test_what_cannot_be_compared_is_one_message(folders, monkeypatch, capsys, tmp_path):
    assert compare(monkeypatch, folders, "base", "wide") == 2
    assert "a vocabulary of 300 tokens" in capsys.readouterr().err
    hf = tiny.save_llama(tmp_path / "hf", vocab_size=tiny.VOCAB, max_position_embeddings=2048)
    tiny.save_tokenizer(hf)
    edit_tensors(hf, **{"model.norm.weight": torch.full((32,), 3e38)})
    assert compare(monkeypatch, folders, "base", hf) == 2
    assert "are not finite" in capsys.readouterr().err
