"""What ranks run in the tests of resuming and loading; imported by name in every rank."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_mod.config import cli
from megatron_mod.conversion.hf_reader import HFReader
from megatron_mod.conversion.source import open_base
from megatron_mod.training.loop import train
from megatron_mod.training.plan import prepare
from tests.distributed import cases
from tests.helpers.ranks import meet


def trainings(jobs: list[tuple[Path | None, dict, list[str]]]) -> None:
    """Trainings one after the other: (run to go on from, degrees, command line)."""
    for before, degrees, arguments in jobs:
        config = cli.parse(arguments)
        meet(**degrees)
        if before is not None and dist.get_rank() == 0:
            shutil.copytree(before, config.checkpoint.save)
            for step in sorted(Path(config.checkpoint.save).glob("step_*"))[1:]:
                shutil.rmtree(step)
        dist.barrier()
        train(config, prepare(config))
        dist.barrier()


def loaded_parameters(
    base: Path, hf_path: Path | None, topologies: list[dict]
) -> list[dict[str, torch.Tensor]]:
    """This rank's parameters, by the names a whole model gives them, at each topology."""
    found = []
    for topology in topologies:
        (model,) = cases.build(open_base(base, hf_path=hf_path), meet(**topology))
        first = model.decoder.layers[0].layer_number - 1
        parameters = {}
        for name, tensor in model.named_parameters():
            head, dot, rest = name.partition("decoder.layers.")
            if dot:
                local, _, rest = rest.partition(".")
                name = f"{head}{dot}{first + int(local)}.{rest}"
            parameters[name] = tensor.detach().clone()
        found.append(parameters)
    return found


def save_in_parts(hf: Path, topologies: list[dict], folders: list[Path]) -> None:
    """The model of a Hugging Face folder, saved by the ranks of each topology as Megatron-LM's
    training saves it."""
    for topology, folder in zip(topologies, folders, strict=True):
        model = cases.build(open_base(hf), meet(**topology))
        state = {k: v for k, v in model.sharded_state_dict().items() if "_extra_state" not in k}
        if dist.get_rank() == 0:
            (folder / "iter_0000001").mkdir(parents=True)
            (folder / "latest_checkpointed_iteration.txt").write_text("1")
        dist.barrier()
        dist_checkpointing.save(state, str(folder / "iter_0000001"))
        dist.barrier()


def rows_read(hf: Path, topologies: list[dict]) -> list[int]:
    """Bytes of weights this rank asks a Hugging Face folder for, at each topology."""
    found, read = [], HFReader.rows
    for topology in topologies:
        taken = []

        def rows(self, *args, _taken=taken, **kwargs):
            _taken.append(read(self, *args, **kwargs))
            return _taken[-1]

        HFReader.rows = rows
        cases.build(open_base(hf), meet(**topology))
        found.append(sum(tensor.nbytes for tensor in taken))
    HFReader.rows = read
    return found
