"""Time of an export beside its original's, and beside the work that its routers leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_mod.config.shapes import SHAPES
from megatron_mod.conversion.export import portable_config
from megatron_mod.conversion.hf_reader import read_config
from megatron_mod.evaluation import speed
from megatron_mod.evaluation.huggingface import load_huggingface, load_model
from megatron_mod.evaluation.prompts import long_prompts
from megatron_mod.evaluation.work import Work
from megatron_mod.hf.graph_mod import DecodingGraphs
from megatron_mod.hf.modeling_mod import MoDLlamaConfig, MoDLlamaForCausalLM
from megatron_mod.parallel import device
from megatron_mod.routing.config import RoutingConfig, resolve_layers
from megatron_mod.routing.scheme import Place, Scheme

Decisions = Mapping[Place, Tensor]  # bool, [B] of sequences or [B, tokens of the call]


@dataclass(frozen=True)
class Pair:
    """A dense model, the same with routers, and ``prompts(batch, context)``: ids ``[B, S]``;
    ``plain``: the dense one in the classes of the routed, which decode by graphs too (None: the
    device has none)."""

    dense: torch.nn.Module
    routed: torch.nn.Module
    prompts: Callable[[int, int], Tensor]
    plain: torch.nn.Module | None = None

    @classmethod
    def of_folders(cls, dense: str | Path, routed: str | Path, *, dtype: torch.dtype) -> Pair:
        """A Hugging Face folder and an export of it; their prompts are real text.

        Raises:
            ValueError: the second is no export, or one of another shape than the first.
        """
        original, export = read_config(dense), read_config(routed)
        for option, folder, config in (("dense", dense, original), ("routed", routed, export)):
            if ("routing" in config) != (option == "routed"):
                raise ValueError(
                    f"--{option} {folder}: {'is' if 'routing' in config else 'is not'} an export "
                    "with routers; give the untouched model as --dense and its export as --routed."
                )
        if Work.of(original).arch != Work.of(export).arch:
            raise ValueError(
                f"--routed {routed}: has another shape than --dense {dense}; give an export of it."
            )
        model, tokenizer = load_huggingface(dense, dtype=dtype)

        def prompts(batch: int, context: int) -> Tensor:
            texts = long_prompts(tokenizer, length=context, count=batch)
            if min(text.shape[1] for text in texts) < context:
                raise ValueError(
                    f"--batches {batch} --contexts {context}: Python's documentation is too short "
                    "for so many such prompts; lower one of them."
                )
            return torch.cat(texts)

        return cls(model, load_model(routed, dtype=dtype), prompts)

    @classmethod
    def of_shape(
        cls, name: str, granularity: str, *, keys_values: str | None = None, dtype: torch.dtype
    ) -> Pair:
        """A Llama of random weights, which both models share, made on the device; random ids as
        prompts."""
        shape = portable_config(SHAPES[name])
        assert shape.pop("model_type") == "llama"  # each of the two has its own
        layers = shape["num_hidden_layers"]
        chosen = resolve_layers({"deepest": layers // 2}, num_layers=layers)
        routing = RoutingConfig(
            granularity,
            chosen,
            capacity=(0.5,) * len(chosen) * len(Scheme.parse(granularity).targets),
            scope="layer",
            keys_values=keys_values,
        )
        config = MoDLlamaConfig(
            routing=routing.to_dict(), architectures=[MoDLlamaForCausalLM.__name__], **shape
        )
        plain = LlamaConfig(architectures=[LlamaForCausalLM.__name__], **shape)
        torch.manual_seed(0)
        with device.device():
            routed = MoDLlamaForCausalLM._from_config(config, dtype=dtype)
            dense = LlamaForCausalLM._from_config(plain, dtype=dtype)
        dense.load_state_dict(routed.state_dict(), strict=False, assign=True)
        alike = None
        if DecodingGraphs.work_on(routed.device):
            alike = MoDLlamaConfig(architectures=[MoDLlamaForCausalLM.__name__], **shape)
            with device.device():
                alike = MoDLlamaForCausalLM._from_config(alike, dtype=dtype)
            alike.load_state_dict(routed.state_dict(), strict=False, assign=True)
            alike.eval()
        for layer in chosen:
            for weight in routed.model.layers[layer].router.float().parameters():
                torch.nn.init.normal_(weight, std=shape["hidden_size"] ** -0.5)

        def prompts(batch: int, context: int) -> Tensor:
            generator = torch.Generator().manual_seed(context)
            return torch.randint(shape["vocab_size"], (batch, context), generator=generator)

        return cls(dense.eval(), routed.eval(), prompts, alike)

    def measure(
        self,
        batch: int,
        context: int,
        *,
        repetitions: int,
        new_tokens: int,
        capacity: float | None = None,
    ) -> dict:
        """One row: medians of ``repetitions`` prefills and of ``new_tokens`` decode steps.

        Of each, ``speedup = dense_s / routed_s`` stands beside ``ideal``, the same ratio of the
        work that the decisions of the timed calls leave: floating-point operations of a prefill,
        bytes of weights and cache of a decode step. ``share = speedup / ideal``, and
        ``saving_share = (1 - 1 / speedup) / (1 - 1 / ideal)``, ``None`` where that is less
        than a hundredth to save. ``graphed``: of decode steps by graphs, of ``plain`` and routed.

        Args:
            capacity: share of these prompts' units that the thresholds are first set to keep;
                ``None``: thresholds stay as they are.
        """
        ids = self.prompts(batch, context)
        if capacity is not None:
            hold(self.routed, capacity, ids)
        with decisions_of(self.routed) as made:
            dense, routed = speed.compare(
                [self.dense, self.routed], [ids], prefills=repetitions, new_tokens=new_tokens
            )
        prefill = made[-new_tokens - 1]
        work = Work.of(self.dense.config.to_dict()), Work.of(self.routed.config.to_dict())
        size = self.dense.lm_head.weight.element_size()
        flops = [prefill_flops(w, prefill, length=context) for w in work]

        def decode(timings: Sequence[speed.Timing], made: Sequence[Decisions]) -> dict:
            first, *steps = made[-new_tokens - 1 :]
            where = {"length": context, "element_size": size}
            read = [decode_bytes(w, first, steps, **where) for w in work]
            times = (timing.decode_s for timing in timings)
            return {"capacity": kept_share(steps), **_beside(*times, read[0] / read[1])}

        found = {
            "batch": batch,
            "context": context,
            "capacity": kept_share([prefill]),
            "prefill": _beside(dense.prefill_s, routed.prefill_s, flops[0] / flops[1]),
            "decode": decode([dense, routed], made),
        }
        if self.plain is not None:
            graphed = [self.plain, self.routed]
            with ExitStack() as stack, decisions_of(self.routed) as made:
                for model in graphed:
                    stack.enter_context(model.graphed_decoding())
                timings = speed.compare(graphed, [ids], prefills=1, new_tokens=new_tokens)
            found["graphed"] = decode(timings, made)
        return found


def hold(routed, capacity: float, ids: Tensor) -> None:
    """Set the thresholds so that ``capacity`` of the prompts' ``[B, S]`` units is kept.

    It is in the scope the routers were trained in, but that by ``layer``, where a batch may have
    too few sequences for the share, routers keep numbers of them that come out right in sum.
    """
    routing = routed.config.routing
    shares: float | list[float] = capacity
    if routing["scope"] == "layer" and Scheme.parse(routing["granularity"]).per_sequence:
        batch, routers = len(ids), len(routed.config.places)
        kept = [int(capacity * batch * n + 0.5) for n in range(routers + 1)]
        shares = [(b - a) / batch for a, b in pairwise(kept)]
    routed.set_capacity(shares, ids.to(routed.device))


@contextmanager
def decisions_of(routed) -> Iterator[list[Decisions]]:
    """Collects what each call of a routed model decides, without waiting for the device."""
    made: list[Decisions] = []

    def take(*_: object) -> None:
        decisions = routed.model.record.decisions.items()
        made.append({Place(*place): kept for place, (kept,) in decisions})

    hook = routed.register_forward_hook(take)
    try:
        yield made
    finally:
        hook.remove()


def kept_share(calls: Sequence[Decisions]) -> float:
    """Share of all units that were kept."""
    return fmean([float(kept.float().mean()) for made in calls for kept in made.values()])


def prefill_flops(work: Work, made: Decisions, *, length: int) -> int:
    """Floating-point operations of a batch's forward pass of ``length`` tokens each."""
    kept = _by_token(work, made, length)
    batch = len(next(iter(made.values())))
    rows = ({place: k[row] for place, k in kept.items()} for row in range(batch))
    return sum(work.prefill(length, row) for row in rows)


def decode_bytes(
    work: Work, prefill: Decisions, steps: Sequence[Decisions], *, length: int, element_size: int
) -> float:
    """Bytes that one of these decode steps after a prefill of ``length`` tokens reads, the mean."""
    batch = len(next(iter(prefill.values())))
    history, total = _by_token(work, prefill, length), 0
    for number, step in enumerate(steps):
        now = _by_token(work, step, 1)
        total += work.decode_bytes(
            [length + number] * batch,
            {place: kept.flatten() for place, kept in now.items()},
            _stored(work, history),
            element_size=element_size,
        )
        history = {place: torch.cat([kept, now[place]], 1) for place, kept in history.items()}
    return total / len(steps)


def _by_token(work: Work, made: Decisions, length: int) -> dict[Place, Tensor]:
    """A call's decisions as ``[B, length]`` (of experts ``[B, length * k]``) on the CPU; of a dense
    model, none."""
    if work.routing is None:
        return {}
    entries = work.entries(length)
    return {at: kept.cpu().view(len(kept), -1).expand(-1, entries) for at, kept in made.items()}


def _stored(work: Work, history: Mapping[Place, Tensor]) -> dict[int, list[int]]:
    """How many keys each sequence has in the cache of each layer whose attention is routed after
    its routers decided ``[B, T]``."""
    found, target = {}, work.routing and work.routing.scheme.attention_target
    for place, kept in history.items():
        if place.target != target:
            continue
        if work.routing.keys_values == "all":
            kept = torch.ones_like(kept)
        if window := work.arch.window_size:
            kept = kept[:, -(window - 1) :]
        found[place.layer] = kept.sum(1).tolist()
    return found


def _beside(dense_s: float, routed_s: float, ideal: float) -> dict[str, float | None]:
    speedup, saving = dense_s / routed_s, 1 - 1 / ideal
    return {
        "dense_s": dense_s,
        "routed_s": routed_s,
        "speedup": speedup,
        "ideal": ideal,
        "share": speedup / ideal,
        "saving_share": (1 - 1 / speedup) / saving if saving > 0.01 else None,
    }


def machine(pair: Pair, dtype: str) -> dict[str, object]:
    """Where and with what a measurement was made."""
    return {
        "device": device.describe(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": dtype,
        "granularity": pair.routed.config.routing["granularity"],
        "keys_values": pair.routed.config.routing.get("keys_values"),
    }
