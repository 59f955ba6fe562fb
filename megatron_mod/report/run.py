"""What a training run wrote: settings, progress lines and summary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_mod.checkpoint.manifest import CONFIG, read_manifest, resolve_step
from megatron_mod.config import cli
from megatron_mod.config.model_folder import TrainingRun
from megatron_mod.config.schema import Config
from megatron_mod.monitoring.environment import read_starts
from megatron_mod.monitoring.json_lines import LOG, read_log
from megatron_mod.routing.config import RoutingConfig


@dataclass(frozen=True)
class Run:
    """A run's files as they are now, while it goes on or after it.

    ``steps``, ``validations`` and ``skipped`` are the records of ``metrics.jsonl``; ``routing``
    that of the newest checkpoint, ``None`` before the first and of a run without routers;
    ``summary``: ``None`` until the end; ``starts``: what ``environment.json`` has.
    """

    folder: Path
    config: Config
    routing: RoutingConfig | None
    steps: list[dict]
    validations: list[dict]
    skipped: list[dict]
    summary: dict | None
    starts: list[dict]

    @property
    def settings(self) -> str:
        """``config.yaml``."""
        return (self.folder / CONFIG).read_text(encoding="utf-8")


def read_run(folder: str | Path) -> Run:
    """Read ``checkpoint.save`` of a training.

    Raises:
        ValueError: not such a folder.
    """
    folder = Path(folder)
    if problem := TrainingRun().problem(str(folder)):
        raise ValueError(f"{folder}: {problem}.")
    routing = None
    if (step := resolve_step(folder)) != folder:
        found = RoutingConfig.from_dict(read_manifest(step)["routing"])
        routing = found if found.layers else None
    records = [record for _, record in read_log(folder / LOG)[0]]
    summary = folder / "summary.json"
    return Run(
        folder=folder,
        config=cli.parse(["--config", str(folder / CONFIG)]),
        routing=routing,
        steps=[record for record in records if "loss" in record],
        validations=[record for record in records if "validation_loss" in record],
        skipped=[record for record in records if "skipped" in record],
        summary=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else None,
        starts=read_starts(folder),
    )
