"""What a run that goes on may change, and what it goes on from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch.distributed as dist
import yaml

from megatron_mod.config.model_folder import CONFIG
from megatron_mod.config.schema import Config
from megatron_mod.conversion.source import Base, check_base
from megatron_mod.parallel.topology import print_once
from megatron_mod.routing.config import RoutingConfig
from megatron_mod.training import checkpoint
from megatron_mod.training.checkpoint import RunState
from megatron_mod.training.run_folder import RunFolder

# Everything else says what is computed. The base may have moved: its fingerprint is compared.
_MAY_CHANGE = {
    "model.checkpoint", "model.hf_path", "model.routers", "data.validation",
    "train.steps", "train.micro_batch_size", "train.validation_interval", "train.max_skipped_steps",
    "train.timeout",
}  # fmt: skip
_SECTIONS_THAT_MAY_CHANGE = {"checkpoint", "logging", "parallel"}


def check_settings(config: Config) -> None:
    """Refuse to go on with a run under other settings, before anything is loaded.

    Raises:
        ValueError: ``checkpoint.save`` is something else than a run, or a setting differs.
    """
    run = Path(config.checkpoint.save)
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return
    path = run / CONFIG
    if not path.is_file():
        raise ValueError(
            f"checkpoint.save = {run}: already exists and holds no training run; remove it or give "
            "another output folder."
        )
    before = _flat(yaml.safe_load(path.read_text(encoding="utf-8")))
    now = _flat(yaml.safe_load(yaml.safe_dump(dataclasses.asdict(config))))
    for name in sorted(before.keys() & now.keys()):
        free = name in _MAY_CHANGE or name.split(".")[0] in _SECTIONS_THAT_MAY_CHANGE
        if before[name] != now[name] and not free:
            raise ValueError(
                f"{name} = {now[name]!r}: the run in {run} was started with {before[name]!r}; "
                "set that to go on with it, or give another checkpoint.save."
            )


def _flat(values: dict) -> dict[str, object]:
    return {f"{section}.{k}": v for section, fields in values.items() for k, v in fields.items()}


class Run:
    """Saves the state of a run, and goes on from what an earlier job saved; all ranks alike."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        base: Base,
        routing: RoutingConfig,
        *,
        data: list[str],
    ) -> None:
        """``data``: the identity of the training samples (``Samples.identity``)."""
        self.config = config
        self.folder = folder
        self.base = base
        # Routers, their average and Adam's two moments in float32, and as much again to spare.
        self._size = 2**20 + 2 * 4 * 4 * len(routing.layers) * base.arch.hidden_size
        self._manifest = {
            "base": str(base.path.resolve()),
            "base_config": (
                str(base.huggingface.resolve()) if base.kind == "megatron_lm" else None
            ),
            "base_fingerprint": base.fingerprint(),
            "routing": routing.to_dict(),
            "data": data,
            "topology": _topology(config),
            "steps": config.train.steps,
        }

    def resume(self, state: RunState) -> int:
        """Load the newest good checkpoint; returns its step, or 0 at the start of a run.

        Raises:
            ValueError: damaged checkpoints, another base, or other data.
        """
        found = self.folder.newest_good()
        if found is None:
            state.metrics.continue_after(0)
            return 0
        path, manifest = found
        check_base(self._manifest["base_fingerprint"], manifest, step=path, base=self.base.path)
        if manifest["data"] != self._manifest["data"]:
            raise ValueError(
                f"data.train = {self.config.data.train}: is not what the run in {path.parent} was "
                "trained on so far; put that back, or give another checkpoint.save."
            )
        if manifest["step"] > self.config.train.steps:
            raise ValueError(
                f"train.steps = {self.config.train.steps}: the run in {path.parent} has already "
                f"made {manifest['step']}; raise it, or give another checkpoint.save."
            )
        same = manifest["topology"] == self._manifest["topology"]
        step = checkpoint.load_step(path, state, same_topology=same)
        if manifest["steps"] != self._manifest["steps"]:
            state.average.forget()  # its steps are the last no more
        state.metrics.continue_after(step)
        how = "" if same else " (on another topology: equal to rounding)"
        print_once(f"Going on after step {step} of {self.config.train.steps}{how}")
        return step

    def save(self, step: int, state: RunState, *, leaving: bool = False) -> None:
        """Save after ``step``; the last step's checkpoint exports the routers' average, if any.

        ``leaving``: whether the job ends here, so that this one has to be written.
        """
        last = step == self.config.train.steps
        manifest = {**self._manifest, "averaged": last}
        self.folder.save(
            step,
            lambda folder: checkpoint.save_step(folder, state, step=step, manifest=manifest),
            size=self._size,
            last=last or leaving,
        )


def _topology(config: Config) -> dict:
    return {**dataclasses.asdict(config.parallel), "world_size": dist.get_world_size()}
