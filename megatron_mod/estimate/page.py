"""An estimate in words."""

from __future__ import annotations

from megatron_mod.config.schema import Config
from megatron_mod.data.order import steps_of
from megatron_mod.estimate import communication, parameters
from megatron_mod.estimate.advice import Change
from megatron_mod.estimate.estimate import Estimate
from megatron_mod.estimate.gpus import CPU, KINDS

GIB = 2**30


def page(found: Estimate) -> str:
    """Parameters, memory by part, time and communication."""
    return "\n\n".join((_model(found), _memory(found), _step(found)))


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def needed(found: Estimate) -> str:
    """Of the fullest device, in a few words."""
    kind = found.cluster.kind
    return f"{gib(found.memory.total)} of {gib(kind.memory)} ({kind.name})"


def advice(change: Change | None) -> str:
    """What to change, in a few lines."""
    if change is None:
        return (
            "No settings were found with which it fits, on up to 16 times as many nodes, with half "
            "of data.max_length or without stand-ins; take a smaller model, or larger GPUs."
        )
    where = "" if change.nodes == 1 else f" on {change.nodes} nodes"
    found = change.found
    return (
        f"It fits{where} with {' '.join(change.options())}: {needed(found)}, "
        f"{found.step.seconds:.3g} s a step."
    )


def _model(found: Estimate) -> str:
    placed, ranks = found.placed, found.placed.job.topology
    total, own = parameters.total(placed), parameters.of_rank(placed, found.rank)
    cluster = found.cluster
    lines = [
        f"machines       {cluster.nodes} node(s) of {cluster.per_node} x {cluster.kind.name}",
        f"ranks          {ranks.world_size} (tensor {ranks.tensor} x pipeline {ranks.pipeline} x "
        f"context {ranks.context} x data {ranks.data}"
        f"{f', experts shared by {ranks.expert}' if ranks.expert > 1 else ''})",
        f"parameters     {total.base + total.added:,}, of which {total.trained:,} train; "
        f"{own.base + own.added:,} on the fullest rank",
    ]
    if ranks.pipeline > 1:
        layout = " + ".join(map(str, placed.cut.layout))
        lines.append(f"stages         {layout} layers, for rows of {placed.length} tokens")
    return "\n".join(lines)


def _memory(found: Estimate) -> str:
    held, ranks = found.memory, found.placed.job.topology
    where = f" (rank {found.rank} of the pipeline)" if ranks.pipeline > 1 else ""
    lines = [f"memory of the fullest device{where}, GiB"]
    parts = {**held.lasting, **(held.step if held.peak == "step" else held.start)}
    parts["libraries, buffers, allocator (assumed)"] = held.overhead
    lines += [f"  {name:<42}{size / GIB:9.2f}" for name, size in parts.items() if size]
    lines.append(f"  {'together':<42}{held.total / GIB:9.2f}")
    if held.peak == "start":
        lines.append(f"  most at the start; {gib(sum(held.step.values()))} come and go in a step")
    lines.append(f"  {'there is':<42}{found.cluster.kind.memory / GIB:9.2f}")
    if cache := found.to_dict()["memory"]["prefix_cache"]:
        lines.append(
            f"  prefix cache: {cache['disk_per_token']} bytes a token on the disk, "
            f"{gib(cache['host_per_rank'])} of host memory a rank of the first stage"
        )
    lines.append("  it fits" if found.fits else "  IT DOES NOT FIT")
    if found.cluster.kind.name != CPU:
        fp8 = found.placed.job.config.model.fp8
        able = [kind for kind in KINDS.values() if kind.fp8 or fp8 is None]
        others = [kind.name for kind in able if held.total <= kind.memory]
        lines.append(f"  kinds with room for it: {', '.join(others) or 'none'}")
    return "\n".join(lines)


def _step(found: Estimate) -> str:
    step, report = found.step, found.to_dict()
    lines = [
        f"a step         {step.seconds:.3g} s for {step.tokens:,} tokens "
        f"({step.tokens / step.seconds:,.0f} a second), {step.operations / 1e12:,.1f} TFLOP",
        f"bubble         {100 * step.bubble:.0f} % of it, on average over the pipeline's ranks",
        f"communication  {step.communication:.3g} s of it at most, if none overlaps",
    ]
    lines += [
        f"  {what:<42}{report['communication'][what] / 1e6:12,.1f} MB a rank and step"
        for what in communication.KINDS
        if report["communication"][what]
    ]
    lines.append(f"steps          {_length(found.placed.job.config, seconds=step.seconds)}")
    return "\n".join(lines)


def _length(config: Config, *, seconds: float) -> str:
    """How many steps there will be, as far as that is known without data, and the time they take
    at so many ``seconds`` each."""
    train, most = config.train, config.data.max_train_samples
    if train.steps is not None:
        return f"{train.steps:,}, {seconds * train.steps / 3600:.3g} h together"
    assert train.epochs is not None, "a configuration without a length"
    text = f"train.epochs = {train.epochs:g}: the training counts its samples when it starts"
    if most is not None:
        steps = steps_of(train.epochs, samples=most, batch=train.global_batch_size)
        text += f"; at most {steps:,}, {seconds * steps / 3600:.3g} h (data.max_train_samples)"
    return text
