"""What ranks run of adapters; imported by name in every rank."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron_mod.conversion.lora import put_adapters
from torch import Tensor

from megatron_mod.config.lora import TARGETS
from megatron_mod.conversion.peft import read_peft
from megatron_mod.conversion.restore import load_model
from megatron_mod.conversion.source import open_base
from megatron_mod.data.chat import Sample
from megatron_mod.data.loader import StepBatch
from megatron_mod.evaluation.parity import megatron_logits, prompt_batch
from megatron_mod.model.forward import Outcome, run_batches
from megatron_mod.model.trainable import LORA
from megatron_mod.training.losses import CrossEntropy
from megatron_mod.training.optimizer import wrap_ddp
from tests.distributed import cases
from tests.helpers.ranks import meet

BY_ROWS = ("linear_proj", "linear_fc2")  # whose inputs tensor-parallel ranks share


def logits_and_gradients(
    base: Path, adapter: Path, samples: list[Sample], topologies: list[dict]
) -> list[tuple[list[Tensor], dict[int, dict[str, Tensor]]]]:
    """Of a dense model with a PEFT folder's adapters in each topology: each sample's logits, and
    the whole gradient of each matrix."""
    found = []
    for topology in topologies:
        ranks, opened = meet(**topology), open_base(base)
        settings, adapters = read_peft(adapter, opened.arch)
        options = {"implementation": "local", "trained": (LORA,), "lora": settings}
        model = load_model(opened, None, ranks, **options)
        put_adapters(model, adapters)
        chunks = wrap_ddp(model, use_distributed_optimizer=False)
        for chunk in chunks:
            chunk.zero_grad_buffer()
        batch = cases._loader(samples, ranks, False).step(0)
        run_batches(
            model.train(),
            batch.micro_batches,
            len(batch.micro_batches),
            finish=partial(_share, batch=batch),
            chunks=chunks,
            training=True,
        )
        gradients = {
            layer: {
                name: _whole(name, parameter.main_grad)
                for name, parameter in module.named_parameters()
            }
            for layer, module in model.adapters().items()
        }
        logits = megatron_logits(model, [prompt_batch([sample.ids]) for sample in samples])
        found.append(([each[0] for each in logits], gradients))
    return found


def _share(outcome: Outcome, batch: StepBatch) -> Tensor:
    return CrossEntropy()(outcome, batch).loss


def _whole(name: str, part: Tensor) -> Tensor:
    """The gradient of a matrix of which each tensor-parallel rank may hold a part."""
    target, matrix = name.split(".")
    is_split = (TARGETS[target] in BY_ROWS) == (matrix == "a")
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, 1 if matrix == "a" else 0) if is_split else parts[0].clone()
