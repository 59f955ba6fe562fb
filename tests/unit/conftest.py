"""What tests share: of data a tokenizer and the reading of samples; CUDA graphs on a CPU."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    from tests.helpers import tiny

    return AutoTokenizer.from_pretrained(tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def load(tokenizer, tmp_path):
    from megatron_mod.data.dataset import load_samples

    def call(sources, **options):
        settings = {"max_length": 200, "cache": tmp_path / "cache", **options}
        return load_samples(sources, tokenizer, **settings)

    return call


@pytest.fixture
def graphs(monkeypatch):
    """How often something was recorded."""
    from megatron_mod.hf.graph_mod import DecodingGraphs
    from tests.helpers import graphed

    recorded = []

    def record(self, function, restore):
        recorded.append(1)
        return graphed.record(self, function, restore)

    monkeypatch.setattr(DecodingGraphs, "_record", record)
    monkeypatch.setattr(DecodingGraphs, "work_on", staticmethod(lambda device: True))
    return recorded
