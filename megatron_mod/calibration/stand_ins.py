"""Solved stand-ins as a folder of untrained routers, which trainings and exports start from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from megatron_mod.checkpoint.distributed import save_state
from megatron_mod.checkpoint.folders import new_folder, reason, require_room
from megatron_mod.checkpoint.manifest import STATE, write_manifest
from megatron_mod.config.evaluation import TEXT_LENGTH
from megatron_mod.config.ranks import OPTIONS
from megatron_mod.config.stand_ins import StandInRequest
from megatron_mod.conversion.restore import load_model
from megatron_mod.conversion.source import Base, open_base
from megatron_mod.data.chat import Sample
from megatron_mod.data.dataset import load_samples
from megatron_mod.data.loader import Loader, StepBatch
from megatron_mod.data.order import Order
from megatron_mod.data.tokenizer import load_tokenizer
from megatron_mod.evaluation.perplexity import holds_conversations, read_rows
from megatron_mod.model.architecture import check_parallel
from megatron_mod.model.specs import choose_implementation
from megatron_mod.model.trainable import Trainable
from megatron_mod.parallel.agree import on_first_rank
from megatron_mod.parallel.topology import Topology, print_once
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.routing.scheme import Place
from megatron_mod.training.ending import command
from megatron_mod.training.stand_ins import describe, fit_stand_ins

SEED = 1234  # of the samples' order
ROOM = 2**20  # bytes beside the tensors
AT_A_TIME = 8  # micro-batches of a rank, between two movements of the progress bar
_OPTION_OF = {"router.layers": "--layers", "router.stand_in_rank": "--rank"}


def make_stand_ins(request: StandInRequest, ranks: Topology) -> dict[Place, float]:
    """Solve the stand-ins of a base and write them with untrained routers; called by all ranks.

    Returns the explained share of the variance at each router's place.

    Raises:
        ValueError: a base, layers, a rank or a layout of ranks that do not fit, or data with fewer
            tokens than the model has dimensions; nothing is left behind.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(on_first_rank(lambda: str(stack.enter_context(new_folder(request.save)))))
        base = open_base(request.load, hf_path=request.hf_path, name="--hf-path")
        reference, arch = base.reference(), base.arch
        degrees = {
            "tensor": ranks.tensor, "pipeline": ranks.pipeline, "expert": ranks.expert
        }  # fmt: skip
        check_parallel(arch, **degrees, names=OPTIONS)
        routing = _routing(request, base)
        samples = _samples(request, base)
        tokens = sum(len(sample.ids) for sample in samples)

        dtype = getattr(torch, request.dtype)
        implementation = choose_implementation(dtype=dtype)  # as a training does
        model = load_model(base, routing, ranks, implementation=implementation, dtype=dtype)
        trainable = Trainable(model)
        size = ROOM + 2 * trainable.nbytes()
        on_first_rank(lambda: require_room(folder, size, what="what is fitted"))
        loader = Loader(
            samples,
            global_batch_size=AT_A_TIME * request.batch_size * ranks.data,
            micro_batch_size=request.batch_size,
            seed=SEED,
            data_rank=model.groups.dp.rank(),
            data_ranks=ranks.data,
        )
        explained = fit_stand_ins(model, _shown(loader.passes(), tokens))
        print_once(describe(explained, routing, tokens=tokens, hidden_size=arch.hidden_size))
        shares = {routing.scheme.label(place): share for place, share in explained.items()}
        about = {"data": request.data, "tokens": tokens, "explained": shares}
        manifest = {
            "routing": routing.to_dict(),
            "implementation": implementation,
            "stand_ins": about,
            **reference,
        }
        try:
            _write(folder, trainable, manifest)
            on_first_rank(stack.close)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise ValueError(
                f"--save {request.save}: cannot be written: {reason(error, folder.parent)}."
            ) from error
    print_once(_next_steps(request, routing))
    return explained


def _routing(request: StandInRequest, base: Base) -> RoutingConfig:
    sizes = {"num_layers": base.arch.num_layers, "hidden_size": base.arch.hidden_size}
    try:
        wanted = request.router().resolve(**sizes)
    except ValueError as error:
        text = str(error)
        for setting, option in _OPTION_OF.items():
            text = text.replace(setting, option)
        raise ValueError(text) from error
    return RoutingConfig(  # a router of zeros keeps everything
        wanted.granularity,
        wanted.layers,
        capacity=(1.0,) * len(wanted.places),
        stand_in_rank=wanted.stand_in_rank,
    )


def _samples(request: StandInRequest, base: Base) -> list[Sample]:
    """As many samples, in random order, as have the tokens that are asked for, or all there are."""
    most = base.arch.max_sequence_length
    if (request.max_length or 0) > most:
        raise ValueError(
            f"--max-length {request.max_length}: the model reads at most {most} tokens "
            "(max_position_embeddings)."
        )
    tokenizer = load_tokenizer(base.huggingface, vocab_size=base.arch.vocab_size)
    length = min(request.max_length or TEXT_LENGTH, most)
    found: Sequence[Sample]
    if holds_conversations(request.data):
        found = load_samples(request.data, tokenizer, max_length=length)
    else:
        rows = read_rows(request.data, tokenizer, max_length=length)
        found = [Sample(list(row.ids), [True] * len(row.ids), request.data) for row in rows]
    order = Order([(len(found), 1.0)], seed=SEED)
    samples, tokens = [], 0
    for index in order.epoch(0).tolist():
        if tokens >= request.tokens:
            break
        samples.append(found[index])
        tokens += len(samples[-1].ids)
    if tokens < base.arch.hidden_size:
        raise ValueError(
            f"--data {request.data}: {tokens} tokens of it (--tokens {request.tokens}) do not "
            f"determine a map of a hidden size of {base.arch.hidden_size}; give at least as many."
        )
    return samples


def _shown(batches: Iterable[StepBatch], tokens: int) -> Iterator[StepBatch]:
    """The batches, with a bar that shows how many of the tokens have gone by."""
    with tqdm(desc="fitting stand-ins", total=tokens, unit=" tokens") as bar:
        for batch in batches:
            yield batch
            bar.update(batch.num_tokens)


def _write(folder: Path, trainable: Trainable, manifest: Mapping) -> None:
    """Fill a step's folder, which a training starts from; called by all ranks."""
    target = folder / STATE
    on_first_rank(target.mkdir)
    save_state({"model": trainable.sharded()}, target)
    values = {"kind": "routers", "step": 0, **manifest}
    on_first_rank(lambda: write_manifest(folder, values))


def _next_steps(request: StandInRequest, routing: RoutingConfig) -> str:
    folder = Path(request.save)
    export = folder.with_name(f"{folder.name}_export")
    settings = (
        "--model.routers", folder,
        "--router.granularity", routing.granularity,
        "--router.layers", list(routing.layers),
        "--router.stand_in_rank", routing.stand_in_rank,
    )  # fmt: skip
    return "\n".join(
        (
            f"Done: untrained routers with stand-ins are in {folder}. Next: train them, "
            "or export the model with them as they are:",
            command("launch/pretrain_router.py", "--config", "FILE", *settings),
            command("tools/convert_megatron_to_hf.py", "--load", folder, "--save", export),
        )
    )
