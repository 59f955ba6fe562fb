"""``megatron-mod-evaluate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mod.commands.command import command, ranks
from megatron_mod.config.evaluation import Request
from megatron_mod.config.model_folder import is_megatron
from megatron_mod.process import is_first_rank

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from megatron_mod.parallel.topology import Topology


def main(arguments: Sequence[str] | None = None) -> None:
    with command(Request, arguments) as request:
        manager = None
        if request.tasks:
            from megatron_mod.evaluation.tasks import find_tasks

            manager = find_tasks(request)
        with ranks(request, with_megatron=is_megatron(request.load)) as topology:
            _evaluate(request, manager, topology)


def _evaluate(request: Request, manager: TaskManager | None, topology: Topology) -> None:
    from megatron_mod.evaluation.evaluate import evaluate, table
    from megatron_mod.evaluation.load import load_backend
    from megatron_mod.parallel.topology import print_once, write_once

    backend = load_backend(
        request.load,
        topology,
        base=request.base,
        dtype=request.dtype,
        max_length=request.max_length,
        batch_size=request.batch_size,
        pooling=request.pooling,
        selection=request.selection,
        trust_remote_code=request.trust_remote_code,
    )
    report = evaluate(request, backend, manager, is_first_rank=is_first_rank())
    print_once("\n" + table(report))
    if request.json:
        write_once(Path(request.json), json.dumps(report, indent=2, default=str) + "\n")
