"""``megatron-mod-benchmark-pipeline``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_mod.commands.command import command, ranks
from megatron_mod.config.pipeline_benchmark import PipelineBenchmark


def main(arguments: Sequence[str] | None = None) -> None:
    with command(PipelineBenchmark, arguments) as options, ranks(options) as topology:
        from megatron_mod.benchmark.pipeline import compare, described
        from megatron_mod.parallel.topology import print_once, write_once

        settings = dataclasses.asdict(options)
        save = settings.pop("json")
        for degree in ("tensor", "pipeline", "expert"):
            del settings[degree]
        result = compare(topology, **settings)
        print_once(described(result))
        if save:
            write_once(Path(save), json.dumps(result, indent=2))
