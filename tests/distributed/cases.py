"""What ranks run in the distributed tests; imported by name in every rank."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_mod.conversion.convert import hf_to_megatron
from megatron_mod.conversion.source import Base, open_base
from megatron_mod.data.chat import Sample
from megatron_mod.data.loader import Loader
from megatron_mod.evaluation.parity import max_relative_difference, prompt_batch
from megatron_mod.model.builder import build_model, transformer_config
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.training import checkpoint
from megatron_mod.training.optimizer import wrap_ddp
from megatron_mod.training.step import run_schedule
from tests.helpers.ranks import meet

ROUTED = (1, 2)


def routing_config(**changes: object) -> RoutingConfig:
    settings = {"granularity": "attn_sequence", "layers": ROUTED, "capacity": (0.25, 0.25)}
    return RoutingConfig(**{**settings, "capacity_loss_weight": 0.7, **changes})


def build(base: Path | Base, ranks, *, sequence_parallel: bool = False, routing=None, first=None):
    """This rank's stage of a base checkpoint."""
    base = base if isinstance(base, Base) else open_base(base)
    megatron = transformer_config(
        base.arch,
        dtype=torch.float32,
        tensor=ranks.tensor,
        pipeline=ranks.pipeline,
        sequence_parallel=sequence_parallel,
        first_stage_layers=first,
    )
    model = build_model(base.arch, megatron, routing)
    checkpoint.load_base(model, base)
    return model


def convert(hf: Path, save: Path) -> None:
    hf_to_megatron(hf, save)


def logit_differences(
    cases: list[tuple[Path, Path]], topologies: list[dict], vocab: int, routing: RoutingConfig
) -> dict:
    """Largest relative logit difference of each (Hugging Face, base) pair in each topology, with
    routers at their initial zeros."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for topology in topologies:
        topology = dict(topology)
        sequence_parallel = topology.pop("sequence_parallel", False)
        ranks = meet(**topology)
        for hf, base in cases:
            lengths = (12, 20)  # multiples of the tensor degree, as sequence parallelism needs
            ids = [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]
            model = build(base, ranks, sequence_parallel=sequence_parallel, routing=routing)
            key = (base.name, *sorted(topology.items()), sequence_parallel)
            batches = [prompt_batch(ids), prompt_batch(ids[::-1])]
            found[key] = max_relative_difference(model, hf, batches)
    return found


def gradients(
    base: Path,
    samples: list[Sample],
    routers: dict[int, torch.Tensor],
    topologies: list[dict],
    routings: list[RoutingConfig],
) -> dict:
    """Loss, penalty, capacity and router gradients of one global batch in each topology."""
    found = {}
    for topology in topologies:
        topology = dict(topology)
        sequence_parallel = topology.pop("sequence_parallel", False)
        distributed = topology.pop("use_distributed_optimizer", False)
        first = topology.pop("first", None)
        ranks = meet(**topology)
        for number, routing in enumerate(routings):
            model = build(
                base, ranks, sequence_parallel=sequence_parallel, routing=routing, first=first
            )
            for layer, router in model.routers().items():
                router.weight.data.copy_(routers[layer])
            frozen = checkpoint.frozen_digests(model)
            ddp = wrap_ddp(model, use_distributed_optimizer=distributed)
            ddp.zero_grad_buffer()
            controller = CapacityController(routing)
            batch = _loader(samples, ranks, sequence_parallel).step(0)
            result = run_schedule(ddp, model, batch, routing, controller=controller)
            loss = result.task_loss + controller.penalty(result.capacity)
            # With the distributed optimizer a rank's buffer holds the sums of its shard only.
            grads = (
                {}
                if distributed
                else {k: r.weight.main_grad.clone() for k, r in model.routers().items()}
            )
            name = (*sorted(topology.items()), sequence_parallel, distributed, first, number)
            found[name] = {
                "loss": float(loss),
                "capacity": result.capacity.tolist(),
                "gradients": grads,
                "frozen_changed": checkpoint.count_changed(
                    frozen, checkpoint.frozen_digests(model)
                ),
            }
    return found


def _loader(samples: list[Sample], ranks, sequence_parallel: bool) -> Loader:
    from megatron.core import parallel_state

    return Loader(
        samples,
        global_batch_size=len(samples),
        micro_batch_size=2,
        seed=5,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_ranks=ranks.data,
        multiple=ranks.tensor if sequence_parallel else 1,
    )
