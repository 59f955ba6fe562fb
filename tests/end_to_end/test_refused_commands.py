"""What commands refuse, as a user runs them, before anything is done."""

from __future__ import annotations

import shutil
import sys

import pytest

from megatron_mod.config import cli
from tests.distributed import cases
from tests.helpers.commands import ROOT, run, save_tiny, settings, torchrun
from tests.helpers.text import write_lines


@pytest.fixture(scope="module")
def tiny_hf(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="module")
def base(tiny_hf, single_process):
    cases.convert(tiny_hf, tiny_hf.parent / "megatron")
    return tiny_hf.parent / "megatron"


@pytest.fixture(scope="module")
def base_settings(base):
    rows = [{"prompt": f"{n} why?", "completion": f"so {n * n}"} for n in range(12)]
    return settings(base, write_lines(base.parent / "data.jsonl", rows))


MISTAKES = [
    (["--router.capcity", "0.5"], "did you mean 'router.capacity'"),
    (["--router.layers", "[7]"], "router.layers: [7] out of range"),
    (["--parallel.tensor_model_parallel_size", "3"], "does not divide the 2 ranks"),
    (["--train.global_batch_size", "3"], "train.global_batch_size = 3"),
    (["--model.checkpoint", "nowhere"], "nowhere: does not exist"),
    (["--data.train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--checkpoint.save", "tests"], "checkpoint.save = tests: already exists"),
    (["--data.max_length", "999"], "data.max_length = 999"),
]


def start(asked, monkeypatch, *, world: int) -> None:
    """What ``pretrain_router`` does before ranks meet, in this process."""
    from megatron_mod.training.plan import prepare

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    prepare(cli.parse([str(part) for part in asked]))


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=lambda v: v[0] if v else "")
def test_mistakes_are_refused_at_start(base_settings, tmp_path, monkeypatch, change, message):
    save = tmp_path / "run"
    with pytest.raises(ValueError) as caught:
        start([*base_settings, "--checkpoint.save", save, *change], monkeypatch, world=2)
    assert message in str(caught.value)
    assert not save.exists()


def test_tensor_degree_that_does_not_divide_the_heads(base_settings, tmp_path, monkeypatch):
    degree = ["--parallel.tensor_model_parallel_size", 3, "--checkpoint.save", tmp_path / "run"]
    with pytest.raises(ValueError, match="4 attention heads; use one of"):
        start([*base_settings, *degree], monkeypatch, world=3)


def test_a_model_without_its_tokenizer_is_named(base_settings, base, tmp_path, monkeypatch):
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    for path in (copy / "huggingface").glob("tokenizer*"):
        path.unlink()
    change = ["--model.checkpoint", copy, "--checkpoint.save", tmp_path / "run"]
    with pytest.raises(ValueError, match="no tokenizer that Transformers can load"):
        start([*base_settings, *change], monkeypatch, world=2)


def test_a_mistake_is_told_once_and_by_one_rank(tmp_path):
    printed = torchrun(
        2, "launch/pretrain_router.py", "--config", "configs/smollm2/135m_attn_sequence.yaml",
        "--router.capcity", "0.5", ok=False,
    )  # fmt: skip
    (told,) = (line for line in printed.splitlines() if line.startswith("error: "))
    assert printed.count("error: ") == 1
    assert "did you mean 'router.capacity'" in told
    assert printed.rstrip().splitlines()[-2].endswith(told.removeprefix("error: "))
    assert 'pretrain_router.py", line' not in printed, "no traceback of ours"


def test_tools_refuse_with_a_message(tmp_path):
    for tool, options in (
        ("convert_hf_to_megatron.py", ["--hf-path", "nowhere"]),
        ("convert_megatron_to_hf.py", ["--load", "nowhere"]),
    ):
        printed = run(
            sys.executable, f"tools/{tool}", *options, "--save", tmp_path / "out", ok=False
        )
        assert f"error: {options[0]} nowhere: no such folder" in printed
        assert "Traceback" not in printed
        assert not (tmp_path / "out").exists()


def test_quickstart_refuses_before_it_starts(tiny_hf, tmp_path):
    cases = [
        (["--out", tmp_path], "already exists"),
        (["--held-out", 0], "--held-out 0: must be at least 1"),
        (["--hf-path", tmp_path / "none"], "no such folder"),
        (["--hf-path", tiny_hf, "--tensor", 3], "4 attention heads; use one of [1, 2, 4]"),
        (["--hf-path", tiny_hf, "--pipeline", 5], "4 layers; use at most 4"),
        (["--hf-path", tiny_hf, "--nproc", 3], "multiple of --tensor 1 x --pipeline 2"),
    ]
    for options, message in cases:
        options = ["--out", tmp_path / "x", *options]
        printed = run(sys.executable, "launch/quickstart.py", *options, ok=False)
        assert message in printed
        assert "Traceback" not in printed
        assert not (tmp_path / "x").exists()
