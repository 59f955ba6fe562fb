"""Logits of a Megatron model beside those of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_mod.data.batch import MicroBatch
from megatron_mod.data.chat import IGNORE
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.layout import TokenLayout
from megatron_mod.parallel import device
from megatron_mod.routing.masks import TokenRole, valid_tokens


def prompt_batch(rows: Sequence[Sequence[int]]) -> MicroBatch:
    """Token ids of different lengths as prompts without answers, padded on the right."""
    length = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    roles = torch.full((len(rows), length), int(TokenRole.PADDING), dtype=torch.uint8)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row)
        roles[index, : len(row)] = int(TokenRole.PROMPT)
    position_ids = torch.arange(length).expand_as(input_ids).contiguous()
    labels = torch.full_like(input_ids, IGNORE)
    documents = tuple((len(row),) for row in rows)
    return MicroBatch(input_ids, position_ids, labels, roles, documents)


@torch.no_grad()
def megatron_logits(model: ModelChunks, batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Logits ``[B, S, vocab]`` of each batch, on the last pipeline stage; elsewhere nothing."""
    model.eval()

    def forward_step(data, model):
        batch = next(data).to(device.device())
        layout = TokenLayout(
            roles=batch.roles, position_ids=batch.position_ids, documents=batch.documents
        )
        output = model(batch.input_ids, batch.position_ids, None, packed_seq_params=layout)
        return output, partial(_whole_vocabulary, vocab_size=model.unpadded_vocab_size)

    logits = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=list(model),
        num_microbatches=len(batches),
        seq_length=batches[0].input_ids.shape[1],
        micro_batch_size=batches[0].input_ids.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    return logits


def _whole_vocabulary(output: Tensor, *, vocab_size: int, non_loss_data: bool) -> Tensor:
    assert non_loss_data
    return gather_from_tensor_model_parallel_region(output)[..., :vocab_size]


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
