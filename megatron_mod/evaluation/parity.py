"""Logits of a Megatron model beside those of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_mod.config.model_folder import is_run
from megatron_mod.conversion.source import open_source
from megatron_mod.data.batch import MicroBatch
from megatron_mod.data.python_docs import topic_text
from megatron_mod.evaluation.forward import run_forward
from megatron_mod.evaluation.rows import Row, collate_rows
from megatron_mod.model.builder import ModelChunks
from megatron_mod.parallel import device
from megatron_mod.parallel.topology import Topology
from megatron_mod.routing.masks import valid_tokens
from megatron_mod.training.restore import restore_model

PROMPT_WORDS = (64, 200)


def prompt_batch(rows: Sequence[Sequence[int]]) -> MicroBatch:
    """Token ids of different lengths as prompts without answers, padded on the right."""
    return collate_rows([Row.prompt(row) for row in rows])


def megatron_logits(model: ModelChunks, batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Logits ``[B, S, vocab]`` of each batch, on the last pipeline stage; elsewhere nothing."""

    def whole_vocabulary(logits: Tensor, batch: MicroBatch) -> Tensor:
        return gather_from_tensor_model_parallel_region(logits)[..., : model.unpadded_vocab_size]

    return run_forward(model.eval(), batches, len(batches), read=whole_vocabulary)


def compare(
    load: str | Path, hf_path: str | Path, ranks: Topology, *, base: str | Path | None = None
) -> float:
    """``max_relative_difference`` of a base checkpoint or a training run on some real English, the
    start of Python's language reference; called by all ranks.

    ``base``: where the base of a training run is now, if not where it was.
    """
    model, tokenizer = restore_model(open_source(load, base=base if is_run(load) else None), ranks)
    words = topic_text().split()
    rows = tokenizer([" ".join(words[:count]) for count in PROMPT_WORDS])["input_ids"]
    return max_relative_difference(model, hf_path, [prompt_batch(rows)])


@torch.no_grad()
def max_relative_difference(
    model: ModelChunks, hf_path: str | Path, batches: Sequence[MicroBatch]
) -> float:
    """Largest logit difference over largest logit, over all valid tokens; same on every rank.

    Both sides compute in fp32. Batches of ``prompt_batch`` make both decide on whole rows.
    """
    ours = megatron_logits(model, batches)
    result = torch.zeros((), device=device.device())
    if ours and parallel_state.get_tensor_model_parallel_rank() == 0:
        hf = AutoModelForCausalLM.from_pretrained(
            hf_path, trust_remote_code=True, dtype=torch.float32
        ).to(device.device())
        largest = torch.zeros((), device=device.device())
        for logits, batch in zip(ours, batches, strict=True):
            batch = batch.to(device.device())
            valid = valid_tokens(batch.roles)
            theirs = hf(batch.input_ids, attention_mask=valid.long(), use_cache=False).logits
            result = torch.maximum(result, (logits - theirs)[valid].abs().max())
            largest = torch.maximum(largest, theirs[valid].abs().max())
        result = result / largest
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return float(result)
