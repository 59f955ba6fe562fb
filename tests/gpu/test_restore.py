"""A run is evaluated, calibrated and resumed on the layers that it was trained on."""

from __future__ import annotations

import pytest
import torch

from megatron_mod.parallel.topology import ONE_RANK
from tests.helpers.runs import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16 = 0.05  # of the largest logit, through a few layers


@pytest.mark.parametrize("trained", ["local", "transformer_engine"])
@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "block_token"])
def test_layers_and_logits(tmp_path, single_process, trained, granularity):
    engine = pytest.importorskip("transformer_engine.pytorch")
    from megatron_mod.conversion.restore import restore_model
    from megatron_mod.conversion.source import open_source
    from megatron_mod.evaluation.parity import megatron_logits, prompt_batch
    from megatron_mod.model.attention import TorchCoreAttention
    from megatron_mod.model.transformer_engine import TECoreAttention

    assert engine
    trainer = Trainer(tmp_path)
    run = tmp_path / "run"
    trainer.train(
        run,
        model__transformer_impl=trained,
        model__dtype="bfloat16",
        router__granularity=granularity,
        router__pooling="all" if granularity.endswith("sequence") else None,
        train__steps=2,
    )
    batch = prompt_batch([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15]])
    logits = {}
    for asked in (None, "local", "transformer_engine"):
        model, _ = restore_model(
            open_source(run), ONE_RANK, implementation=asked, dtype=torch.bfloat16
        )
        kind = TECoreAttention if (asked or trained) == "transformer_engine" else TorchCoreAttention
        for layer in model[0].decoder.layers:
            assert type(layer.self_attention.core_attention) is kind
        (found,) = megatron_logits(model, [batch])
        logits[asked] = found.float()
    assert torch.equal(logits[None], logits[trained])
    largest = logits["local"].abs().max()
    difference = (logits["local"] - logits["transformer_engine"])[0].abs().max()
    assert difference <= BF16 * largest
