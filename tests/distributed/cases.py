"""What ranks run in the distributed tests; imported by name in every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_mod.config.lora import LoraSettings
from megatron_mod.conversion.convert import hf_to_megatron
from megatron_mod.conversion.hf_reader import HFReader
from megatron_mod.conversion.lora import Adapters, put_adapters
from megatron_mod.conversion.restore import load_model, put_added
from megatron_mod.conversion.routers import Added
from megatron_mod.conversion.source import Base, open_base
from megatron_mod.data.batch import collate
from megatron_mod.data.chat import Sample
from megatron_mod.data.loader import Loader, StepBatch
from megatron_mod.evaluation.parity import (
    max_relative_difference,
    megatron_logits,
    prompt_batch,
)
from megatron_mod.model.cost import training_costs
from megatron_mod.model.lora import seed_dropout
from megatron_mod.model.pipeline import cheapest_layout, even_layout
from megatron_mod.model.trainable import LORA, ROUTERS, STAND_INS, count_changed, frozen_digests
from megatron_mod.parallel import device
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import Scheme
from megatron_mod.training.optimizer import wrap_ddp
from megatron_mod.training.plan import LOSSES
from megatron_mod.training.step import run_schedule
from tests.helpers.ranks import meet
from tests.helpers.thinned import is_asked

ROUTED = (1, 2)


class Asked(NamedTuple):
    """A training whose loss and gradients are to be found; ``price`` is that of the steps before,
    of each router; ``added`` what these have, if not what all trainings do. ``adapters``
    are whole, of the layers and projections in ``lora``."""

    routing: RoutingConfig
    loss: str = "task"
    price: tuple[float, ...] | None = None
    added: Added | None = None
    lora: LoraSettings | None = None
    adapters: Adapters | None = None
    trained: tuple[str, ...] = (ROUTERS, STAND_INS, LORA)


def routing_config(**changes: object) -> RoutingConfig:
    settings = {"granularity": "attn_sequence", "layers": ROUTED, **changes}
    routers = len(settings["layers"]) * len(Scheme.parse(settings["granularity"]).targets)
    return RoutingConfig(**{"capacity": (0.25,) * routers, "capacity_loss_weight": 0.7, **settings})


def build(
    base: Path | Base,
    ranks,
    *,
    sequence_parallel: bool = False,
    routing=None,
    layout=None,
    **options: object,
):
    """This rank's part of a base checkpoint; all that is added to it trains unless it is said what
    does (``trained``). ``options``: more of ``load_model``."""
    base = base if isinstance(base, Base) else open_base(base)
    ranks = replace(ranks, sequence_parallel=sequence_parallel, pipeline_layout=layout)
    options = {"implementation": "local", "trained": (ROUTERS, STAND_INS, LORA), **options}
    return load_model(base, routing, ranks, **options)


def convert(hf: Path, save: Path) -> None:
    hf_to_megatron(hf, save)


def logit_differences(
    cases: list[tuple[Path, Path]],
    topologies: list[dict],
    vocab: int,
    routing: RoutingConfig,
    every: int = 1,
) -> dict:
    """Largest relative logit difference of (Hugging Face, base) pairs in each topology, with
    routers at their initial zeros; of one in ``every`` of both together."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for place, topology in enumerate(topologies):
        topology = dict(topology)
        sequence_parallel = topology.pop("sequence_parallel", False)
        ranks = meet(**topology)
        for number, (hf, base) in enumerate(cases):
            if not is_asked(place, number, every):
                continue
            lengths = (12, 20)  # multiples of the tensor degree, as sequence parallelism needs
            ids = [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]
            model = build(base, ranks, sequence_parallel=sequence_parallel, routing=routing)
            key = (base.name, *sorted(topology.items()), sequence_parallel)
            batches = [prompt_batch(ids), prompt_batch(ids[::-1])]
            found[key] = max_relative_difference(model, hf, batches)
    return found


def experts_read(bases: list[Path]) -> list[set[int]]:
    """Whose tensors this of two ranks that share the experts reads of each of these folders, of one
    tensor an expert or with all in one."""
    ranks, read, whole = meet(expert=2), set(), HFReader.rows

    def watched(self, name: str, start: int, stop: int, *columns: slice):
        if ".experts." in name:
            number = name.partition(".experts.")[2].partition(".")[0]
            read.update([int(number)] if number.isdigit() else range(start, stop))
        return whole(self, name, start, stop, *columns)

    found = []
    with pytest.MonkeyPatch.context() as context:
        context.setattr(HFReader, "rows", watched)
        for base in bases:
            read.clear()
            build(base, ranks)
            found.append(set(read))
    return found


def refusals(bases: list[Path], whole: Path, hf: Path) -> list[str]:
    """What this of two ranks says against loading each of these bases, and against comparing a
    whole one with a folder that the last stage reads."""
    said, ranks = [], meet(tensor=2)
    for base in bases:
        try:
            build(base, ranks)
        except ValueError as error:
            said.append(str(error))
    model = build(whole, meet(pipeline=2))
    try:
        max_relative_difference(model, hf, [prompt_batch([[5, 6, 7]])])
    except ValueError as error:
        said.append(str(error))
    return said


def gradients(
    base: Path,
    samples: list[Sample],
    added: Added,
    topologies: list[dict],
    trainings: list[Asked],
    every: int = 1,
) -> dict:
    """Loss, penalty, capacity, price and gradients of one global batch in each topology, and the
    loss of an evaluation, which really skips; of one in ``every`` pair of topology and training.

    A topology may say more of how the model is built and run: ``logits`` asks for those of the
    evaluation, each sample's ``[tokens, vocab]``; ``precision`` is that of float32 products.
    """
    found = {}
    for place, topology in enumerate(topologies):
        topology = dict(topology)
        sequence_parallel = topology.pop("sequence_parallel", False)
        distributed = topology.pop("use_distributed_optimizer", False)
        layout = topology.pop("layout", None)
        packed = topology.pop("packed", False)
        rows = topology.pop("rows", 2)
        recompute = topology.pop("recompute", "none")
        implementation = topology.pop("implementation", "local")
        dtype = topology.pop("dtype", torch.float32)
        precision = topology.pop("precision", "highest")
        wants_logits = topology.pop("logits", False)
        torch.set_float32_matmul_precision(precision)
        ranks = meet(**topology)
        for number, asked in enumerate(trainings):
            if not is_asked(place, number, every):
                continue
            routing, loss, price, own = asked[:4]
            model = build(
                base,
                ranks,
                sequence_parallel=sequence_parallel,
                routing=routing,
                layout=layout or cheapest(base, ranks, routing, samples),
                recompute=recompute,
                implementation=implementation,
                dtype=dtype,
                lora=asked.lora,
                trained=asked.trained,
            )
            put_added(model, only(own or added, routing))
            put_adapters(model, asked.adapters or {})
            seed_dropout(asked.lora, seed=3, groups=model.groups)
            frozen = frozen_digests(model)
            chunks = wrap_ddp(model, use_distributed_optimizer=distributed)
            for chunk in chunks:
                chunk.zero_grad_buffer()
            controller = CapacityController(routing, device=device.device())
            if price is not None:
                controller.price = torch.tensor(price, device=device.device())
            batch = _loader(samples, ranks, sequence_parallel, rows=rows).step(0)
            if packed:
                batch = pack(samples)
            result = run_schedule(
                chunks,
                model,
                batch,
                routing,
                controller=controller,
                loss=LOSSES[loss](),
                check_decisions=True,
            )
            total = result.loss + controller.penalty(result.capacity)
            found_price = []
            if price is not None:
                controller.price = None
                controller.end_step(result.capacity, result.pull, result.num_units)
                found_price = controller.price.tolist()
            if distributed:
                gather_gradients(chunks)
            grads = {
                (layer, name): parameter.main_grad.cpu().clone()
                for layer, module in model.routed_layers().items()
                for name, parameter in module.named_parameters()
                if parameter.requires_grad and not name.startswith("lora.")
            } | whole_gradients(model)
            model.eval()
            with torch.no_grad():
                evaluated = run_schedule(chunks, model, batch, routing, controller=None)
                logits = _logits(model, samples) if wants_logits else None
                by_rule = evaluated
                if routing.is_exact:
                    by_rule = run_schedule(
                        chunks, model, batch, routing, controller=None, causal=True
                    )
            name = (
                *sorted(topology.items()),
                sequence_parallel,
                distributed,
                layout,
                packed,
                rows,
                recompute,
                implementation,
                dtype,
                precision,
                number,
            )
            found[name] = {
                "logits": logits,
                "loss": float(total),
                "price": found_price,
                "step_task_loss": float(result.task_loss),
                "task_loss": float(evaluated.task_loss),
                "evaluated_capacity": evaluated.capacity.tolist(),
                "capacity": result.capacity.tolist(),
                "causal": {
                    "task_loss": float(by_rule.task_loss),
                    "capacity": by_rule.capacity.tolist(),
                    "agreement": result.agreement.tolist(),
                    "loss": result.causal_loss.tolist(),
                },
                "gradients": grads,
                "random": get_cuda_rng_tracker().get_states(),
                "frozen_changed": count_changed(frozen, frozen_digests(model)),
            }
    torch.set_float32_matmul_precision("highest")
    return found


def whole_gradients(model) -> dict[tuple[int, str], torch.Tensor]:
    """Of the adapters of this rank's layers, by layer and name; tensor-parallel ranks that have
    whole matrices have to have found the same."""
    found, group = {}, model.groups.tp
    for layer, adapters in model.adapters().items():
        for name, parameter in adapters.named_parameters():
            if not parameter.requires_grad:
                continue
            parts = [torch.empty_like(parameter.main_grad) for _ in range(group.size())]
            dist.all_gather(parts, parameter.main_grad.contiguous(), group=group)
            axis = getattr(parameter, "partition_dim", None)
            if axis is None:
                assert all(torch.equal(part, parts[0]) for part in parts), (layer, name)
            whole = parts[0] if axis is None else torch.cat(parts, axis)
            found[layer, f"lora.{name}"] = whole.cpu()
    return found


def _logits(model, samples: list[Sample]) -> list[torch.Tensor]:
    """Of each sample ``[tokens, vocab]``, on the last pipeline stage."""
    rows = (row for logits in megatron_logits(model, [collate(samples)]) for row in logits.cpu())
    return [row[: len(sample.ids)] for row, sample in zip(rows, samples, strict=False)]


def cheapest(base: Path, ranks, routing: RoutingConfig, samples: list[Sample]):
    """The layout that a training has by default."""
    if ranks.pipeline == 1:
        return None
    if not routing.layers:
        return even_layout(open_base(base).arch.num_layers, ranks.stages)
    lengths = [len(sample.ids) for sample in samples]
    labels = sum(sample.num_labels for sample in samples)
    costs = training_costs(open_base(base).arch, routing, lengths, labels=labels)
    return cheapest_layout(costs, ranks.stages)


def only(added: Added, routing: RoutingConfig) -> Added:
    """Those of the tensors that layers so routed have."""
    return {k: {name: own[name] for name in routing.added_names} for k, own in added.items()}


def layers_with_backward(base: Path, samples: list[Sample], routing: RoutingConfig) -> list[int]:
    """The layers of this rank whose output a backward pass has to go through."""
    ranks = meet(pipeline=2)
    model = build(base, ranks, routing=routing, layout=(2, 2))
    seen = []

    def note(layer: torch.nn.Module, inputs: tuple, outputs: tuple) -> None:
        if outputs[0].requires_grad:
            seen.append(layer.layer_number - 1)

    for layer in model[0].decoder.layers:
        layer.register_forward_hook(note)
    batch = _loader(samples, ranks, False).step(0)
    chunks = wrap_ddp(model, use_distributed_optimizer=False)
    run_schedule(chunks, model, batch, routing, controller=CapacityController(routing))
    return sorted(set(seen))


def disagreement(base: Path, samples: list[Sample], routing: RoutingConfig) -> str:
    """What a training says whose tensor-parallel ranks hold different routers."""
    ranks = meet(tensor=2)
    model = build(base, ranks, routing=routing)
    for index, layer in model.routed_layers().items():
        sign = -1 if index == 2 and model.groups.tp.rank() else 1
        for router in layer.routers.values():
            router.weight.data.fill_(0.3 * sign)
    batch = _loader(samples, ranks, False).step(0)
    chunks, controller = (
        wrap_ddp(model, use_distributed_optimizer=False),
        CapacityController(routing),
    )
    try:
        run_schedule(chunks, model, batch, routing, controller=controller, check_decisions=True)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def gather_gradients(chunks: list) -> None:
    """Fill the gradient buffers of a distributed optimizer, of which each rank has its shard."""
    data = parallel_state.get_data_parallel_group(with_context_parallel=True)
    experts = parallel_state.get_expert_data_parallel_group()
    for chunk in chunks:
        buffers = [(each, data) for each in chunk.buffers]
        buffers += [(each, experts) for each in chunk.expert_parallel_buffers]
        for buffer, group in buffers:
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def pack(samples: list[Sample]) -> StepBatch:
    """Eight samples as one micro-batch of three rows of two documents and one of two rows, one
    with one document and one with none but padding."""
    rows = [samples[0:2], samples[2:4], samples[4:6]], [samples[6:8], []]
    return StepBatch(
        [collate(micro_batch, multiple=8) for micro_batch in rows],
        num_sequences=len(samples),
        num_tokens=sum(len(sample.ids) for sample in samples),
        num_labels=sum(sample.num_labels for sample in samples),
        num_positions=0,
    )


def _loader(samples: list[Sample], ranks, sequence_parallel: bool, *, rows: int = 2) -> Loader:
    return Loader(
        samples,
        global_batch_size=len(samples),
        micro_batch_size=rows,
        seed=5,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_ranks=ranks.data,
        multiple=(ranks.tensor if sequence_parallel else 1) * 2 * ranks.context,
        group=ranks.pipeline if ranks.virtual_pipeline else 1,
    )


def micro_batches(samples: list[Sample], *, rows: int = 2) -> list[list[Sample]]:
    """Which samples each micro-batch of the step holds, on whatever rank it is."""
    by_ids = {tuple(sample.ids): sample for sample in samples}
    loader = Loader(samples, global_batch_size=len(samples), micro_batch_size=rows, seed=5)
    return [
        [
            by_ids[tuple(row[: lengths[0]].tolist())]
            for row, lengths in zip(batch.input_ids, batch.documents, strict=True)
        ]
        for batch in loader.step(0).micro_batches
    ]


def batch_of(samples: list[Sample], ranks, sequence_parallel: bool) -> StepBatch:
    """This rank's part of the global batch."""
    return _loader(samples, ranks, sequence_parallel).step(0)


def both_cuts(settings: dict) -> dict:
    """What the benchmark of pipeline cuts finds on two ranks."""
    from megatron_mod.benchmark.pipeline import compare

    return compare(meet(pipeline=2), **settings)
