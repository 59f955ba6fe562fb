"""What ranks run in the tests of training a whole model; imported by name in every rank."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mod.checkpoint.distributed import load_state, load_tensors, save_state
from megatron_mod.conversion.restore import put_added
from megatron_mod.conversion.routers import Added
from megatron_mod.data.chat import Sample
from megatron_mod.model.trainable import BASE, ROUTERS, STAND_INS, Trainable
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.training.optimizer import wrap_ddp
from megatron_mod.training.step import run_schedule
from tests.distributed import cases
from tests.helpers.ranks import meet

WHOLE = (BASE, ROUTERS, STAND_INS)


def gradients(
    models: list[tuple[Path, list[Sample], Added]],
    topologies: list[dict],
    trainings: list[cases.Asked],
    folder: Path,
) -> list[tuple[float, dict[str, torch.Tensor], tuple[float, float]]]:
    """Task loss of a step, gradients of all parameters, whole and by their keys in a checkpoint,
    and the step's mean load-balancing loss with what it adds to the loss, of each model in each
    topology and training, in this order; ranks that hold the same have to have found the same."""
    found = []
    for base, samples, added in models:
        for topology in topologies:
            topology = dict(topology)
            sequence_parallel = topology.pop("sequence_parallel", False)
            distributed = topology.pop("use_distributed_optimizer", False)
            recompute = topology.pop("recompute", "none")
            ranks, losses = meet(**topology), []
            own: dict = {}
            read: dict = {}
            for number, asked in enumerate(trainings):
                model = cases.build(
                    base,
                    ranks,
                    sequence_parallel=sequence_parallel,
                    routing=asked.routing,
                    layout=cases.cheapest(base, ranks, asked.routing, samples),
                    recompute=recompute,
                    trained=WHOLE,
                )
                put_added(model, cases.only(added, asked.routing))
                chunks = wrap_ddp(model, use_distributed_optimizer=distributed)
                for chunk in chunks:
                    chunk.zero_grad_buffer()
                result = run_schedule(
                    chunks,
                    model,
                    cases.batch_of(samples, ranks, sequence_parallel),
                    asked.routing,
                    controller=CapacityController(asked.routing),
                    check_decisions=True,
                )
                if distributed:
                    cases.gather_gradients(chunks)
                balance = float(result.load_balancing), float(result.balance_loss)
                losses.append((float(result.task_loss), balance))
                trainable, prefix = Trainable(model), f"{number}."
                made = {key: each.main_grad for key, each in trainable.parameters.items()}
                empty = {key: torch.empty_like(gradient) for key, gradient in made.items()}
                own |= trainable.sharded(made, prefix=prefix)
                read |= trainable.sharded(empty, prefix=prefix)
            whole = _whole(own, read, folder / str(len(found)))
            for number, (loss, balance) in enumerate(losses):
                prefix = f"{number}."
                gradients = {
                    key.removeprefix(prefix): gradient
                    for key, gradient in whole.items()
                    if key.startswith(prefix)
                }
                found.append((loss, gradients, balance))
    return found


def _whole(own: dict, read: dict, folder: Path) -> dict[str, torch.Tensor]:
    """Of what ranks describe as their ``own``, put together; ``read``: described so too, to read
    into."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    kept = {key: entry.data for key, entry in own.items()}
    save_state(own, folder)
    for key, gradient in load_state(read, folder).items():
        torch.testing.assert_close(kept[key], gradient, rtol=1e-4, atol=1e-6, msg=key)
    return load_tensors(folder)
