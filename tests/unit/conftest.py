"""What tests of data share: a tokenizer, and the reading of samples with it."""

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
