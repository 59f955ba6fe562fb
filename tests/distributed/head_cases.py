"""Losses of whole logits, beside which those of chunks are held; imported by name in every rank."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_mod.conversion.restore import put_added
from megatron_mod.conversion.routers import Added
from megatron_mod.data.chat import IGNORE, Sample
from megatron_mod.data.loader import StepBatch
from megatron_mod.model import head
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.forward import Outcome
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.training.losses import Shares, dense_states
from megatron_mod.training.optimizer import wrap_ddp
from megatron_mod.training.plan import LOSSES
from megatron_mod.training.step import run_schedule
from tests.distributed import cases
from tests.helpers.ranks import meet

CHUNK = 4  # which does not divide all labels of these batches


class WholeLogits:
    """The logits of all tokens and all of the vocabulary, and torch's own losses of them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def prepare(self, model: ModelChunks, batch: StepBatch) -> None:
        self.teacher = dense_states(model, batch)

    def __call__(self, outcome: Outcome, batch: StepBatch) -> Shares:
        labels = outcome.batch.labels
        logits = _whole(outcome, outcome.states(torch.ones_like(labels).nonzero(as_tuple=True)))
        options = {"ignore_index": IGNORE, "reduction": "sum"}
        entropy = F.cross_entropy(logits, labels.flatten(), **options)
        teacher = _whole(outcome, self.teacher.pop(0))
        ours = logits[labels.flatten() != IGNORE].log_softmax(-1)
        apart = F.kl_div(ours, teacher.log_softmax(-1), log_target=True, reduction="sum")
        loss = {"task": entropy, "distill": apart, "both": entropy + apart}[self.name]
        return Shares(loss / batch.num_labels, entropy.detach() / batch.num_labels)


def _whole(outcome: Outcome, states: Tensor) -> Tensor:
    model = outcome.model
    logits = gather_from_tensor_model_parallel_region(model.head(states))
    return logits[:, : model.unpadded_vocab_size]


def in_chunks_and_whole(
    base: Path, samples: list[Sample], added: Added, routing: RoutingConfig, topology: dict
) -> dict[str, list[tuple[Tensor, Tensor, dict]]]:
    """Of each loss, computed in chunks and from whole logits, its value, the cross entropy and this
    rank's router gradients."""
    topology = dict(topology)
    sequence_parallel = topology.pop("sequence_parallel", False)
    head.CHUNK = CHUNK
    ranks = meet(**topology)
    batch = cases._loader(samples, ranks, sequence_parallel).step(0)
    assert any((b.labels != IGNORE).sum() % CHUNK for b in batch.micro_batches)
    found: dict = {}
    for name, make in LOSSES.items():
        for loss in (make(), WholeLogits(name)):
            model = cases.build(base, ranks, sequence_parallel=sequence_parallel, routing=routing)
            put_added(model, cases.only(added, routing))
            chunks = wrap_ddp(model, use_distributed_optimizer=False)
            for chunk in chunks:
                chunk.zero_grad_buffer()
            controller = CapacityController(routing)
            result = run_schedule(chunks, model, batch, routing, controller=controller, loss=loss)
            grads = {k: r.weight.main_grad.clone() for k, r in model.routers().items()}
            found.setdefault(name, []).append((result.loss, result.task_loss, grads))
    return found
