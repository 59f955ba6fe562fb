"""What a run that goes on may change, and what it goes on from."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_mod.checkpoint.folders import require_writable
from megatron_mod.checkpoint.manifest import read_manifest, step_folders
from megatron_mod.config.cli import to_yaml
from megatron_mod.config.schema import Config
from megatron_mod.conversion.source import REFERENCE, check_base
from megatron_mod.parallel.topology import print_once
from megatron_mod.training import checkpoint
from megatron_mod.training.checkpoint import RunState
from megatron_mod.training.companions import companions_of
from megatron_mod.training.restarts import this_start
from megatron_mod.training.run_folder import SUMMARY, RunFolder, holds_run, is_new

if TYPE_CHECKING:
    from megatron_mod.training.plan import Plan

# Everything else says what is computed. The base may have moved: its fingerprint is compared.
_MAY_CHANGE = {
    "model.checkpoint", "model.hf_path", "model.routers", "data.validation", "data.packing",
    "train.steps", "train.epochs", "train.micro_batch_size", "train.validation_interval",
    "train.max_skipped_steps", "train.timeout", "train.exit_duration", "train.exit_interval",
    "train.frozen_prefix", "train.prefix_cache", "train.recompute", "train.deterministic",
}  # fmt: skip
# What a run did that was started before there were these settings.
_BEFORE = {
    "router.bias": False, "router.init": "zeros", "router.stand_in": "none",
    "router.work": None, "router.selection": "threshold", "train.loss": "task",
    "train.trainable": "routers", "lora.rank": None,
}  # fmt: skip
_SECTIONS_THAT_MAY_CHANGE = {"checkpoint", "logging", "parallel"}


def check_settings(config: Config) -> None:
    """Refuse to go on with a run under other settings, before anything is loaded.

    A run without a checkpoint binds its folder to nothing; a damaged checkpoint is found later.

    Raises:
        ValueError: ``checkpoint.save`` is something else than a run or cannot be written, or a
            setting differs.
    """
    run = Path(config.checkpoint.save)
    require_writable(run, what="checkpoint.save")
    if is_new(run):
        return
    if not holds_run(run):
        raise ValueError(
            f"checkpoint.save = {run}: already exists and holds no training run; remove it or give "
            "another output folder."
        )
    for step in step_folders(run):
        with contextlib.suppress(ValueError):
            manifest = read_manifest(step)
            break
    else:
        return
    _check_same(config, manifest, run)


def _check_same(config: Config, manifest: dict, run: Path) -> None:
    before, now = {**_BEFORE, **_flat(manifest["settings"])}, _flat(_settings(config))
    for name in sorted(before.keys() & now.keys()):
        free = name in _MAY_CHANGE or name.split(".")[0] in _SECTIONS_THAT_MAY_CHANGE
        if name == "model.config":  # a file may have moved; fields are what they are
            free = isinstance(before[name], str) and isinstance(now[name], str)
        if before[name] != now[name] and not free:
            raise ValueError(
                f"{name} = {now[name]!r}: the run in {run} was started with {before[name]!r}; "
                "set that to go on with it, or give another checkpoint.save."
            )


def _settings(config: Config) -> dict:
    """The settings as a manifest gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _layers(manifest: dict) -> str | None:
    """What a manifest says that the layers were."""
    parts = manifest.get("implementation"), manifest.get("fp8")
    return " in FP8 ".join(filter(None, parts)) or None


def _flat(values: dict) -> dict[str, object]:
    return {f"{section}.{k}": v for section, fields in values.items() for k, v in fields.items()}


class RunCheckpoints:
    """Saves the state of a run, and goes on from what an earlier job saved; all ranks alike."""

    def __init__(self, config: Config, folder: RunFolder, plan: Plan) -> None:
        self.config = config
        self.folder = folder
        self.base, self.steps = plan.base, plan.steps
        self._companions = companions_of(config, plan)
        reference = plan.goes_on or plan.base.reference()
        self.base_fingerprint = reference["base_fingerprint"]
        self._manifest = {
            "run": folder.identity(),
            **{name: reference[name] for name in REFERENCE},
            "whole": plan.is_whole,
            "routing": plan.routing.to_dict(),
            "lora": plan.lora.to_dict() if plan.lora else None,
            "implementation": plan.implementation,
            "fp8": config.model.fp8,
            "data": plan.train.identity,
            "topology": _topology(config, plan),
            "steps": self.steps,
            "settings": _settings(config),
            **this_start(),
        }

    def resume(self, state: RunState) -> int | None:
        """Load the newest good checkpoint; returns its step, or None at the start of a run.

        Raises:
            ValueError: damaged checkpoints, another base, other data or other settings, or a disk
                without room for another checkpoint.
        """
        found = self.folder.newest_good()
        step = self._load(*found, state) if found else None
        state.metrics.goes_on(
            step or 0, found and found[1]["progress"]["metrics"], run=self._manifest["run"]
        )
        if step is None or step < self.steps:
            self.folder.require_room(self._size(state))
        self.folder.write_settings(self._manifest["run"], to_yaml(self.config))
        return step

    def _load(self, path: Path, manifest: dict, state: RunState) -> int:
        _check_same(self.config, manifest, path.parent)
        check_base(self._manifest["base_fingerprint"], manifest, step=path, base=self.base.path)
        if manifest["data"] != self._manifest["data"]:
            raise ValueError(
                f"data.train = {self.config.data.train}: is not what the run in {path.parent} was "
                "trained on so far; put that back, or give another checkpoint.save."
            )
        if manifest["step"] > self.steps:
            raise ValueError(
                f"{self._length()}: the run in {path.parent} has already made "
                f"{manifest['step']} steps; raise it, or give another checkpoint.save."
            )
        same = manifest["topology"] == self._manifest["topology"]
        step = checkpoint.load_step(path, state, same_topology=same)
        if manifest["steps"] != self.steps:
            state.average.forget()  # its steps are the last no more
        if step == self.steps and not (path.parent / SUMMARY).exists():
            print_once(f"All {step} steps are done; the run's summary is still to be written.")
        elif step == self.steps:
            print_once(
                f"The run in {path.parent} is finished: all {step} steps are done. Raise "
                f"{self._length().partition(' ')[0]} to go on with it."
            )
        else:
            before, now = (_layers(m) for m in (manifest, self._manifest))
            changed = [
                *(() if same else ("on another topology",)),
                *(() if before in (now, None) else (f"on {now} layers instead of {before}",)),
            ]
            how = f" ({' and '.join(changed)}: equal to rounding)" if changed else ""
            print_once(f"Going on after step {step} of {self.steps}{how}")
        return step

    def _length(self) -> str:
        """The setting that says how long the run is, and its value."""
        train = self.config.train
        if train.epochs is None:
            return f"train.steps = {train.steps}"
        return f"train.epochs = {train.epochs:g} ({self.steps} steps)"

    def save(
        self,
        step: int,
        state: RunState,
        *,
        capacity: list[float] | None = None,
        leaving: bool = False,
    ) -> None:
        """Save after ``step``; the last step's checkpoint exports the average, if any.

        Args:
            capacity: what each place keeps, where the settings do not say it.
            leaving: whether the job ends here, so that this one has to be written.
        """
        last = step == self.steps
        routing = self._manifest["routing"]
        routing = {**routing, "capacity": capacity or routing["capacity"]}
        manifest = {**self._manifest, "averaged": last, "routing": routing}
        self.folder.save(
            step,
            lambda folder: checkpoint.save_step(
                folder, state, step=step, manifest=manifest, companions=self._companions
            ),
            size=self._size(state),
            last=last or leaving,
        )

    def _size(self, state: RunState) -> int:
        """Bytes of a checkpoint, at most: what is kept; of what trains an average, Adam's two
        moments and, where it is no fp32 itself, an fp32 parameter; each rank's random states, a
        folder's other files, and something to spare; called by all ranks."""
        tensors = state.trainable.nbytes() + 4 * 4 * state.trainable.count()
        random = dist.get_world_size() * sum(checkpoint.random_sizes().values())
        beside = sum(map(len, (self._companions or {}).values()))
        return 2**20 + beside + 2 * random + tensors * 9 // 8


def _topology(config: Config, plan: Plan) -> dict:
    """All that the last bit of a step depends on besides what is computed."""
    ranks = {**dataclasses.asdict(config.parallel), "world_size": dist.get_world_size()}
    del ranks["pipeline_layout"]  # what became of it
    if plan.topology.expert == 1:  # as steps of before there were experts have it
        del ranks["expert_model_parallel_size"]
    if layout := plan.topology.pipeline_layout:
        ranks["pipeline_layout"] = list(layout)
    if config.train.frozen_prefix == "cache":
        ranks["frozen_prefix"] = config.train.frozen_prefix
    return {**ranks, "random": checkpoint.random_sizes()}
