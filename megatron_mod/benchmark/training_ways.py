"""The ways of training that tools/benchmark/training.py compares, and the settings of each.

Like is compared with like: the same samples in the same steps, routers that start at zeros, no
biases, no stand-ins, no penalty (``router.capacity`` 1), so that all ways but two minimise the same
loss and their routers' gradients of the first step are one: that of ``REFERENCE``, the published
formula in plain Transformers in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_mod.config.recipes import PUBLISHED, as_options

if TYPE_CHECKING:
    from torch import Tensor


class Taken(NamedTuple):
    """A step: useful tokens (no padding) of the global batch, and the gradient of the routers'
    weights ``[num_routed, H]``, where there is one."""

    tokens: int
    gradient: Tensor | None


@dataclass(frozen=True)
class Way:
    """A way of training.

    Args:
        what: in a few words.
        is_plain: whether it is plain Transformers; else settings of ours.
        settings: what ours is told beside what all are.
        no_gradient: why its routers' gradient is not compared; unset: it is.
    """

    what: str
    is_plain: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)
    no_gradient: str | None = None

    @property
    def fills_cache(self) -> bool:
        return self.settings.get("train.frozen_prefix") == "cache"


WARM_UP = 3  # steps; routers with biases have come to their capacity by then
REFERENCE = "reference"
CACHE = {"train.frozen_prefix": "cache"}
WAYS = {
    "published": Way(
        "plain Transformers: update times a straight-through mask, gradients from the embeddings",
        is_plain=True,
    ),
    "full": Way(
        "plain Transformers: full fine-tuning, no routers",
        is_plain=True,
        no_gradient="has no routers",
    ),
    "published_stop": Way(
        "plain Transformers: as published, but backward ends at the first router", is_plain=True
    ),
    "recompute": Way("ours: every layer is run at every step"),
    "cached": Way("ours: what enters the first routed layer is read from a cache", settings=CACHE),
    # A row holds several documents, so that it is a micro-batch by itself.
    "cached_packed": Way(
        "ours: cached, several documents in a row",
        settings={**CACHE, "data.packing": "true", "train.micro_batch_size": 1},
    ),
    "sparse": Way(
        "ours: skipped units are not computed, half of them by routers with biases",
        settings={
            "router.training_compute": "sparse",
            "router.bias": "true",
            "router.capacity": 0.5,
            "router.capacity_loss_weight": "auto",
        },
        no_gradient="skips, so that its routers hear of less",
    ),
}


@dataclass(frozen=True)
class Setup:
    """What all ways have in common.

    Args:
        hf_path: the model.
        data: what is trained on.
        granularity: what is routed.
        layers: how many of the deepest layers but the last are routed.
        ranks: processes of ours; the plain ways are one.
        pipeline: pipeline stages of ours.
        batch: sequences a step.
        micro_batch: rows a forward pass.
        max_length: tokens a sample is cut to.
        steps: of each round.
        rounds: that are timed.
        dtype: of frozen weights and activations; ``None``: bfloat16 on a GPU, else float32.
        settings: further ones of ours, as on a training's command line.
    """

    hf_path: Path
    data: Path
    granularity: str
    layers: int
    ranks: int
    pipeline: int
    batch: int
    micro_batch: int
    max_length: int
    steps: int
    rounds: int
    dtype: str | None
    settings: Sequence[str]

    @property
    def all_steps(self) -> int:
        """The first ones, the timed rounds, and a round in which operations are counted."""
        return WARM_UP + (self.rounds + 1) * self.steps

    def options(self, name: str, scratch: Path) -> list[str]:
        """A way's training, as on its command line; the plain ways, and the reference, take data,
        batches, layers and learning rate from it.

        Args:
            scratch: folder of everything that is written.
        """
        way = WAYS["published_stop" if name == REFERENCE else name]
        common = {
            "model.hf_path": self.hf_path,
            "model.dtype": self.dtype,
            **PUBLISHED,
            "router.granularity": self.granularity,
            "router.layers.deepest": self.layers,
            "router.capacity": 1.0,
            "data.train": self.data,
            "data.max_length": self.max_length,
            "data.max_train_samples": self.all_steps * self.batch,
            "data.packing": "false",
            "data.cache": scratch / "data",
            "train.steps": self.all_steps,
            "train.global_batch_size": self.batch,
            "train.micro_batch_size": self.micro_batch,
            "parallel.pipeline_model_parallel_size": 1 if way.is_plain else self.pipeline,
            "checkpoint.save": scratch / name,
            "logging.interval": self.all_steps,
        }
        cache = {"train.prefix_cache": scratch / "prefix"} if way.fills_cache else {}
        ours = [] if way.is_plain else self.settings
        return [*as_options({**common, **cache, **way.settings}), *ours]
