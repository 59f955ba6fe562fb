"""The same equalities on CUDA: run where there is a GPU, skipped with a reason elsewhere."""

from __future__ import annotations

import pytest
import torch

from megatron_mod.conversion.convert import hf_to_megatron
from tests.distributed import cases
from tests.helpers import tiny
from tests.helpers.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory, single_process):
    folder = tmp_path_factory.mktemp("gpu")
    hf = tiny.save_llama(folder / "hf", num_key_value_heads=2)
    hf_to_megatron(hf, folder / "megatron")
    return hf, folder / "megatron"


def test_logits_equal_hugging_face(model, tmp_path):
    routing = cases.routing_config()
    (found,) = run_ranks(
        cases.logit_differences, [model], [{}], 128, routing, world=1, folder=tmp_path
    )
    assert max(found.values()) <= 2e-5
