"""Logits of a Megatron model beside those of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_mod.config.model_folder import LORA, is_run
from megatron_mod.conversion.hf_reader import HFReader, read_config
from megatron_mod.conversion.merging import adapted_weights
from megatron_mod.conversion.restore import restore_model
from megatron_mod.conversion.routers import HF_KEY
from megatron_mod.conversion.source import Source, open_source
from megatron_mod.conversion.weights import hf_weights
from megatron_mod.data.batch import MicroBatch
from megatron_mod.data.python_docs import topic_text
from megatron_mod.evaluation.huggingface import load_model
from megatron_mod.evaluation.rows import Row, collate_rows
from megatron_mod.model.architecture import check_fp8
from megatron_mod.model.builder import ModelChunks
from megatron_mod.model.forward import Outcome, run_batches
from megatron_mod.model.fp8 import require_device
from megatron_mod.model.layout import StepContext
from megatron_mod.parallel import device
from megatron_mod.parallel.agree import together
from megatron_mod.parallel.topology import Topology
from megatron_mod.routing.masks import valid_tokens

PROMPT_WORDS = (64, 200)
FP8_STEP = 2.0**-3  # of E4M3, relative


def prompt_batch(rows: Sequence[Sequence[int]]) -> MicroBatch:
    """Token ids of different lengths as prompts without answers, padded on the right."""
    return collate_rows([Row.prompt(row) for row in rows])


def megatron_logits(model: ModelChunks, batches: Sequence[MicroBatch]) -> list[Tensor]:
    """Logits ``[B, S, vocab]`` of each batch, on the last pipeline stage; elsewhere nothing. Exact
    routers decide by the causal rule, as an export's do."""

    def whole_vocabulary(outcome: Outcome) -> Tensor:
        whole = torch.ones_like(outcome.batch.labels, dtype=torch.bool)
        logits = outcome.model.head(outcome.states(whole.nonzero(as_tuple=True))).unflatten(
            0, whole.shape
        )
        return gather_from_tensor_model_parallel_region(logits)[..., : model.unpadded_vocab_size]

    step = StepContext(causal=True)
    return run_batches(model.eval(), batches, len(batches), finish=whole_vocabulary, step=step)


def compare(
    load: str | Path,
    hf_path: str | Path,
    ranks: Topology,
    *,
    base: str | Path | None = None,
    fp8: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[float, float]:
    """``max_relative_difference`` of a base checkpoint or a training run on some real English, the
    start of Python's language reference, and what rounding explains; called by all ranks.

    The layers are ``local``, whatever the training ran: Transformer Engine multiplies fp32 in TF32,
    whose rounding is above what tells two models apart. With ``fp8`` they are Transformer Engine's,
    in bfloat16 with products in that format, of which one step is what rounding may explain.

    ``base``: where the base of a training run is now, if not where it was.

    Raises:
        ValueError: ``fp8`` that cannot work with this model or here.
    """
    source = open_source(load, base=base if is_run(load) else None)
    if fp8 is None:
        tolerance = default_tolerance(source, hf_path)
        model, tokenizer = restore_model(source, ranks, implementation="local")
    else:
        layers: dict = {"implementation": "transformer_engine", "dtype": torch.bfloat16}
        check_fp8(source.base.arch, fp8, tensor=ranks.tensor, name="--fp8")
        require_device(fp8, layers["implementation"], name="--fp8")
        tolerance = FP8_STEP
        model, tokenizer = restore_model(source, ranks, fp8=fp8, **layers)
    words = topic_text().split()
    rows = tokenizer([" ".join(words[:count]) for count in PROMPT_WORDS])["input_ids"]
    difference = max_relative_difference(
        model, hf_path, [prompt_batch(rows)], trust_remote_code=trust_remote_code
    )
    return difference, tolerance


@torch.no_grad()
def max_relative_difference(
    model: ModelChunks,
    hf_path: str | Path,
    batches: Sequence[MicroBatch],
    *,
    trust_remote_code: bool = False,
) -> float:
    """Largest logit difference over largest logit, over all valid tokens; same on every rank.

    Both sides compute in fp32. Batches of ``prompt_batch`` make both decide on whole rows.

    Raises:
        ValueError: a folder that cannot be loaded, another vocabulary, or logits that are not
            finite; on all ranks.
    """
    if (theirs := read_config(hf_path).get("vocab_size")) != model.unpadded_vocab_size:
        raise ValueError(
            f"{hf_path}: has a vocabulary of {theirs} tokens, and the Megatron model one of "
            f"{model.unpadded_vocab_size}: these are not the same model."
        )
    ours = megatron_logits(model, batches)
    compares = bool(ours) and model.groups.tp.rank() == 0
    with together():
        hf = load_model(hf_path, trust_remote_code=trust_remote_code) if compares else None
    result = torch.zeros((), device=device.device())
    if compares:
        hf = hf.to(device.device())
        largest = torch.zeros((), device=device.device())
        for logits, batch in zip(ours, batches, strict=True):
            batch = batch.to(device.device())
            valid = valid_tokens(batch.roles)
            theirs = hf(batch.input_ids, attention_mask=valid.long(), use_cache=False).logits
            result = torch.maximum(result, (logits - theirs)[valid].abs().max())
            largest = torch.maximum(largest, theirs[valid].abs().max())
        result = (result / largest.clamp(min=torch.finfo(largest.dtype).tiny)).nan_to_num(torch.inf)
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    if not torch.isfinite(result):
        raise ValueError(f"{hf_path}: its logits, or those of the Megatron model, are not finite.")
    return float(result)


ROUNDING = 1e-4  # of fp32, in models of any depth; those of equal weights are nearer
ROUNDED_STEPS = 8  # of a dtype's epsilon: what rounding weights to it does to logits


def default_tolerance(source: Source, hf_path: str | Path) -> float:
    """The largest relative difference two copies of a model may have, whose weights, those a
    training added among them, may have been rounded to another dtype in between."""
    with hf_weights(source.base) as weights, HFReader(hf_path) as reader:
        ours = {weight.name: weight.like.dtype for weight in weights}
        if source.routing is not None:
            for layer, name in product(source.routing.layers, source.routing.added_names):
                ours[HF_KEY.format(layer, name)] = torch.float32
        if source.lora is not None and not Path(hf_path, LORA).is_dir():  # sums, not rounded here
            ours |= dict.fromkeys(adapted_weights(source.lora), torch.float32)
        pairs = [(ours[name], reader.like(name).dtype) for name in ours.keys() & reader.names()]
    rounded = [max(torch.finfo(d).eps for d in pair) for pair in pairs if pair[0] != pair[1]]
    return max(ROUNDING, ROUNDED_STEPS * max(rounded, default=0.0))
