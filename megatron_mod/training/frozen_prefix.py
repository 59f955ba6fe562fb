"""The frozen prefix, computed once: what enters the first routed layer is a constant of the text.

The hidden states there are computed for every sample that a run reads, unless an earlier job has
done so, and the model that trains starts from them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from filelock import FileLock, Timeout

from megatron_mod.checkpoint.folders import require_writable, writing
from megatron_mod.config.schema import Config
from megatron_mod.data.cache import default_folder
from megatron_mod.data.dataset import Samples
from megatron_mod.data.prefix_states import StatesEntry
from megatron_mod.parallel import topology
from megatron_mod.parallel.agree import on_first_rank, together
from megatron_mod.training.needed_states import Needed, needed_by
from megatron_mod.training.plan import DTYPES, Plan
from megatron_mod.training.prefix_filling import fill

SECONDS_BETWEEN_LOOKS = 1.0


def with_states(config: Config, plan: Plan, *, base_fingerprint: str) -> Plan:
    """The plan whose samples bring the hidden states that enter its first computed layer, where
    ``train.frozen_prefix`` is ``cache``; what is not kept yet is computed first. Called by all
    ranks.

    Raises:
        ValueError: the disk has no room for it, or the folder cannot be written or is not the same
            one on all machines.
    """
    if not plan.computed.start:
        return plan
    topology.at("looking for kept hidden states")
    beside = Path(config.data.cache or default_folder()) / "prefix"
    folder = Path(config.train.prefix_cache or beside)

    def opened(samples: Samples) -> Samples:
        return Samples(
            replace(part, states=_states(part.store, config, plan, folder, base_fingerprint))
            for part in samples.parts
        )

    plain, validation = plan, plan.validation
    plan = replace(
        plan, train=opened(plan.train), validation=opened(validation) if validation else None
    )
    needed = needed_by(config, plan)
    missing, _ = needed.missing(np.arange(len(needed)))
    if len(missing):
        on_first_rank(lambda: require_writable(folder, what="train.prefix_cache"))
        with _only_filler(needed.entries, folder):
            missing, damaged = needed.missing(missing)  # another job may have been here meanwhile
            _tell(needed, damaged)
            if len(missing):
                fill(config, plan, needed, missing, folder=folder)
    with together():
        _require_kept(needed, folder)
    is_first_stage = topology.process_groups().pp.rank() == 0
    return plan if is_first_stage else plain


def _states(store, config: Config, plan: Plan, folder: Path, base_fingerprint: str) -> StatesEntry:
    key = {
        "base": base_fingerprint,
        "samples": store.summary.fingerprint,
        "layer": plan.computed.start,
        "dtype": config.model.dtype,
        "implementation": plan.implementation,
        **({"fp8": config.model.fp8} if config.model.fp8 else {}),
    }
    width, dtype = plan.base.arch.hidden_size, DTYPES[config.model.dtype]
    return StatesEntry(folder, key, store.lengths(), width=width, dtype=dtype)


@contextlib.contextmanager
def _only_filler(entries: Sequence[StatesEntry], folder: Path) -> Iterator[None]:
    """Keep other jobs from computing the same, and wait for one that does; all ranks."""
    waits = False
    with contextlib.ExitStack() as held:
        while not on_first_rank(lambda: _take(entries, folder, held)):
            if not waits:
                topology.print_once(f"{folder}: waiting for another job that fills it")
            waits = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        yield


def _take(entries: Sequence[StatesEntry], folder: Path, held: contextlib.ExitStack) -> bool:
    """Lock all the entries, or none."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for entry in entries:
            lock = FileLock(entry.path.with_name(f"{entry.path.name}.lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                held.close()
                return False
            held.callback(lock.release)
    return True


def _tell(needed: Needed, damaged: np.ndarray) -> None:
    for entry, its in needed.by_entry(damaged):
        topology.print_once(
            f"warning: {entry.path}: the hidden states of {len(its)} sample(s), the first of them "
            f"{needed.sample(its[0]).source}, are not what was written (checksum); they are "
            "computed anew.",
            level=logging.WARNING,
        )


def _require_kept(needed: Needed, folder: Path) -> None:
    for entry, its in needed.by_entry(np.arange(len(needed))):
        if not entry.noted(needed.place[its]).all():
            raise ValueError(
                f"train.prefix_cache = {folder}: rank {dist.get_rank()} does not find there what "
                "others have computed; give a folder that all machines share."
            )
