"""Where a training's pipeline is cut."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mod.config.lora import LoraSettings
from megatron_mod.config.schema import Config, ParallelConfig
from megatron_mod.data.dataset import Samples
from megatron_mod.model.architecture import Architecture
from megatron_mod.model.cost import Costs, training_costs
from megatron_mod.model.pipeline import Layout, cheapest_layout, even_layout, step_cost
from megatron_mod.parallel.topology import Topology
from megatron_mod.routing.config import RoutingConfig


def asked_layout(p: ParallelConfig, arch: Architecture) -> Layout | None:
    """The layout that the settings name; ``None``: ``auto``, or there is no pipeline.

    Raises:
        ValueError: it does not fit the model, or the stages.
    """
    ranks, first = p.pipeline_model_parallel_size, p.num_layers_in_first_pipeline_stage
    stages = ranks * (p.virtual_pipeline_model_parallel_size or 1)
    if first is not None:
        _check_first(p, first, num_layers=arch.num_layers)
        return (first, *even_layout(arch.num_layers - first, stages - 1))
    if not isinstance(p.pipeline_layout, str):
        _check_layout(p.pipeline_layout, stages=stages, num_layers=arch.num_layers)
    if stages == 1 or p.pipeline_layout == "auto":
        return None
    if p.pipeline_layout == "even":
        return even_layout(arch.num_layers, stages)
    return tuple(p.pipeline_layout)


def _check_first(p: ParallelConfig, first: int, *, num_layers: int) -> None:
    name = f"parallel.num_layers_in_first_pipeline_stage = {first}"
    if p.virtual_pipeline_model_parallel_size is not None:
        raise ValueError(
            f"{name}: says nothing of a virtual pipeline's chunks; leave it out, or give the "
            "layers of each as parallel.pipeline_layout."
        )
    others = p.pipeline_model_parallel_size - 1
    if not others or num_layers - first < others:
        raise ValueError(
            f"{name}: of {num_layers} layers it must leave the other {others} stage(s) at least "
            "one each; change it or parallel.pipeline_model_parallel_size (2 or more)."
        )


def _check_layout(layout: list[int], *, stages: int, num_layers: int) -> None:
    name, even = f"parallel.pipeline_layout = {layout}", list(even_layout(num_layers, stages))
    if len(layout) != stages:
        raise ValueError(
            f"{name}: gives the layers of {len(layout)} stage(s), but "
            "parallel.pipeline_model_parallel_size x virtual_pipeline_model_parallel_size is "
            f"{stages}; give as many numbers ({even}, for example), or auto."
        )
    if sum(layout) != num_layers:
        raise ValueError(
            f"{name}: is {sum(layout)} layers and this model has {num_layers}; give numbers that "
            f"add up to that ({even}, for example), or auto."
        )
    if 0 in layout[:-1]:
        raise ValueError(
            f"{name}: only the last stage, which has the output layer, can be without layers; give "
            f"the others at least one ({even}, for example), or auto."
        )


@dataclass(frozen=True)
class Cut:
    """A layout, what its stages cost for each other, and how it compares with an even one.

    Args:
        costs: of documents of the training's kind.
        ranks: that share the layers.
        micro_batches: of a step, on each of them.
    """

    layout: Layout
    costs: Costs
    ranks: int
    micro_batches: int

    @property
    def even(self) -> Layout:
        return even_layout(len(self.costs.layers), len(self.layout))

    def step_cost(self, layout: Layout) -> float:
        """Of a step at any layout, in operations that follow one another."""
        return step_cost(self.costs, layout, ranks=self.ranks, micro_batches=self.micro_batches)

    def __str__(self) -> str:
        share = self.step_cost(self.layout) / self.step_cost(self.even)
        return (
            f"pipeline stages: {self._of(self.layout)}; predicted time of a step: {share:.2f} of "
            f"an even cut's ({self._of(self.even)})"
        )

    def _of(self, layout: Layout) -> str:
        """Layers of each stage, and shares of what is computed."""
        stages = self.costs.of(layout)
        shares = " + ".join(f"{100 * stage / sum(stages):.0f}" for stage in stages)
        return f"{' + '.join(map(str, layout))} layers, {shares} % of the operations"


def cut(
    config: Config,
    arch: Architecture,
    routing: RoutingConfig,
    ranks: Topology,
    samples: Samples,
    *,
    asked: Layout | None = None,
    dense_passes: int = 0,
    num_free_layers: int = 0,
    packing: bool = False,
    lora: LoraSettings | None = None,
) -> Cut | None:
    """Where the pipeline is cut; ``None``: there is none.

    Args:
        samples: some of what is trained on, which say how long documents are, and how much of them
            is labelled.
        asked: the layout that the settings name (``asked_layout``), if they do.
        dense_passes: as in ``training_costs``.
        num_free_layers: leading layers that are not run, wherever they are; on the first stage if
            the others have enough without them.
        packing: rows hold several documents.
        lora: the model's adapters.
    """
    if ranks.pipeline == 1:
        return None
    lengths, labels = zip(*((len(one.ids), one.num_labels) for one in samples), strict=True)
    costs = training_costs(
        arch,
        routing,
        lengths,
        labels=sum(labels),
        dense_passes=dense_passes,
        num_free_layers=num_free_layers,
        recompute=config.train.recompute,
        lora=lora,
        parts=config.train.parts,
    )
    documents = max(1, config.data.max_length * len(lengths) // sum(lengths)) if packing else 1
    micro_batches = micro_batches_of(config, ranks, documents=documents)
    return cut_of(
        costs, ranks, micro_batches=micro_batches, asked=asked, num_free_layers=num_free_layers
    )


def cut_of(
    costs: Costs,
    ranks: Topology,
    *,
    micro_batches: int,
    asked: Layout | None = None,
    num_free_layers: int = 0,
) -> Cut:
    """As ``cut``, of layers and micro-batches that cost so much; without a pipeline all layers are
    one stage."""
    num_layers = len(costs.layers)
    others = num_layers - num_free_layers
    in_first = num_free_layers if others >= ranks.stages - 1 else 1
    layout = asked or cheapest_layout(costs, ranks.stages, in_first=in_first)
    return Cut(layout, costs, ranks.pipeline, micro_batches)


def micro_batches_of(config: Config, ranks: Topology, *, documents: int = 1) -> int:
    """About how many of a step each rank runs, with so many documents in a row."""
    rows = documents * config.train.micro_batch_size * ranks.data  # documents, of all ranks at once
    return -(-config.train.global_batch_size // rows)
