"""Logits of untrained routers at every topology against Hugging Face."""

from __future__ import annotations

import shutil

import pytest

from tests.distributed import cases
from tests.helpers import tiny
from tests.helpers.broken import put
from tests.helpers.ranks import run_ranks
from tests.helpers.thinned import number_asked, one_in

ONE = [{}]
TWO = [
    {"tensor": 2},
    {"tensor": 2, "sequence_parallel": True},
    {"pipeline": 2},
    {},  # data 2
]
FOUR = [{"tensor": 2, "pipeline": 2}]
ZEROS = cases.routing_config()
LOGITS = 2e-5  # largest logit difference over largest logit, fp32


@pytest.fixture(scope="module")
def models(tmp_path_factory, single_process):
    """Each tiny model as Hugging Face folder and as base checkpoint; and as its own base, read
    without conversion."""
    root = tmp_path_factory.mktemp("models")
    pairs = []
    kinds = {**{n: ("llama", changes) for n, changes in tiny.LLAMAS.items()}, **tiny.FAMILIES}
    for name, (kind, changes) in kinds.items():
        if name in tiny.MIXTURES:  # which have more topologies: test_mixtures.py
            continue
        hf = tiny.save_model(root / name, kind, **changes)
        cases.convert(hf, root / f"{name}-megatron")
        pairs.append((hf, root / f"{name}-megatron"))
    return pairs + [(hf, hf) for hf, _ in pairs if hf.name in ("odd_vocabulary", "qwen2", "qwen3")]


@pytest.mark.parametrize(
    ("world", "topologies", "every"),
    [
        *one_in(2, 2, TWO, id="two_ranks"),
        pytest.param(4, FOUR, 1, id="four_ranks", marks=pytest.mark.slow),
    ],
)
def test_logits_equal_hugging_face(models, world, topologies, every, tmp_path):
    found = run_ranks(
        cases.logit_differences, models, topologies, 128, ZEROS, every,
        world=world, folder=tmp_path,
    )  # fmt: skip
    for per_rank in found:
        assert len(per_rank) == number_asked(len(topologies), len(models), every)
        assert max(per_rank.values()) <= LOGITS, per_rank


def test_logits_equal_hugging_face_on_one_rank(models, single_process):
    found = cases.logit_differences(models, ONE, 128, ZEROS)
    assert len(found) == len(models)
    assert max(found.values()) <= LOGITS, found


def test_what_one_rank_finds_all_ranks_say(models, tmp_path):
    """Or the others would wait for it, and the first would have nothing to say."""
    (hf, _), name = models[0], "model.layers.3.mlp.up_proj.weight"
    hf = shutil.copytree(hf, tmp_path / "hf")
    base = tmp_path / "base"
    with pytest.MonkeyPatch.context() as context:  # a release that let them through
        context.setattr("megatron_mod.conversion.hf_reader.require_finite", lambda *a, **k: None)
        put(hf, name, float("nan"))  # its last row: the second tensor rank's
        cases.convert(hf, base)
    ours = "decoder.layers.3.mlp.linear_fc1.weight"
    first, second = run_ranks(
        cases.refusals, [hf, base], models[0][1], hf, world=2, folder=tmp_path / "ranks"
    )
    assert first == second
    for said, tensor in zip(first, (name, ours, name), strict=True):
        assert f"{tensor} holds NaN" in said


def test_another_model_is_told_apart(models, single_process):
    swapped = [(models[0][0], models[1][1])]
    (difference,) = cases.logit_differences(swapped, ONE, 128, ZEROS).values()
    assert difference > 0.1
