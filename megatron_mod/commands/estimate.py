"""``megatron-mod-estimate``."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mod.commands.command import command
from megatron_mod.config import cli, machines
from megatron_mod.config.options import option
from megatron_mod.config.rules import InputFile, OutputFile, setting


@dataclass(frozen=True)
class EstimateRequest(machines.Machines):
    """Say what a training will need and take: parameters, memory of a GPU by part, time of a step,
    pipeline bubble, communication, and what to change if it does not fit.

        python tools/estimate.py --config FILE --nodes 1 --gpus-per-node 8 --gpu h100 \\
            [--hf-config llama3-8b] [--section.field value ...] [--json FILE]

    Nothing is run but for --gpu cpu, and no GPU is needed. A training's settings override the
    file's, as in launch/pretrain_router.py. All rows are taken to be data.max_length tokens long
    and labelled everywhere, the most there can be.

    Args:
        config: YAML file of a training.
        gpus_per_node: devices of each, one rank a device; unset: 8.
        gpu: what they are (80 and 24 GB kinds among them); `cpu`: this machine's processor, whose
            rate is measured; unset: h100.
        json: also write the figures to this file, in bytes and seconds.
    """

    config: str = setting(InputFile())
    json: str | None = setting(OutputFile(), default=None)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    names = [option(field.name) for field in dataclasses.fields(EstimateRequest)]
    own, settings = cli.split_off(arguments, (*names, "--help"))
    with command(EstimateRequest, own) as options:
        config = cli.parse(["--config", options.config, *settings])
        per_node = options.gpus_per_node or 8
        machines.check_machines(config.parallel, nodes=options.nodes, per_node=per_node)
        from megatron_mod.estimate.advice import advise
        from megatron_mod.estimate.estimate import estimate
        from megatron_mod.estimate.page import advice, page
        from megatron_mod.estimate.resolve import hf_config_of, kind_of, shape_of

        found = estimate(
            config,
            shape_of(config, hf_config_of(config, options.hf_config)),
            nodes=options.nodes,
            per_node=per_node,
            kind_of=kind_of(options.gpu or "h100", per_node=per_node),
        )
        print(page(found))
        report = found.to_dict()
        if not found.fits:
            change = advise(found)
            print(f"\n{advice(change)}")
            report["change"] = change and {"settings": dict(change.settings), "nodes": change.nodes}
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
