"""What a user wants two cuts of a pipeline measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mod.config.model_folder import HuggingFaceFolder
from megatron_mod.config.ranks import Degrees
from megatron_mod.config.rules import COUNT, InputFile, OutputFile, Range, setting
from megatron_mod.routing.scheme import Granularity


@dataclass(frozen=True, kw_only=True)
class PipelineBenchmark(Degrees):
    """Take training steps at an even cut of the pipeline and at parallel.pipeline_layout = auto.

        torchrun --standalone --nproc_per_node 2 tools/benchmark/pipeline.py --hf-path DIR \\
            --data FILE --json FILE

    Both models are held at once and take turns on the same samples, forward and backward. The more
    micro-batches a step has, the less it waits for the pipeline to fill.

    Args:
        hf_path: model.
        data: conversations to train on.
        granularity: what is routed.
        deepest: how many of the deepest layers but the last are routed; unset: half of all.
        max_length: tokens a sample is cut to.
        global_batch_size: sequences a step.
        micro_batch_size: rows a forward pass.
        repeats: steps of each cut.
        dtype: of frozen weights and activations.
        json: file for the figures.
        pipeline: ranks that share the layers, at least 2.
    """

    hf_path: str = setting(HuggingFaceFolder())
    data: str = setting(InputFile())
    granularity: Granularity = "block_token"
    deepest: int | None = setting(COUNT, default=None)
    max_length: int = setting(Range(least=2), default=512)
    global_batch_size: int = setting(COUNT, default=32)
    micro_batch_size: int = setting(COUNT, default=2)
    repeats: int = setting(COUNT, default=7)
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: str | None = setting(OutputFile(), default=None)
    pipeline: int = setting(Range(least=2), default=2)
