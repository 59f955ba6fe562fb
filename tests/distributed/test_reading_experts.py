"""Straight from a Hugging Face folder, each rank reads the experts it holds."""

from __future__ import annotations

from tests.distributed import cases
from tests.helpers import tiny
from tests.helpers.fused import fuse
from tests.helpers.ranks import run_ranks


def test_a_rank_reads_its_own_experts_and_no_other(tmp_path):
    bases = []
    for name, (kind, changes) in tiny.MIXTURES.items():
        hf = tiny.save_model(tmp_path / name, kind, **changes)
        bases += [hf, fuse(hf, tmp_path / f"{name}_fused")]
    first, second = run_ranks(cases.experts_read, bases, world=2, folder=tmp_path / "ranks")
    assert (first, second) == ([{0, 1}] * len(bases), [{2, 3}] * len(bases))
