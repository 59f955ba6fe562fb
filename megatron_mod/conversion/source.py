"""From a folder a user names to the model in it: whose weights, which shape, which routers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_mod.checkpoint import checksums
from megatron_mod.checkpoint.companions import COMPANION_FILES, read_companions
from megatron_mod.checkpoint.export_checksums import as_written, model_files
from megatron_mod.checkpoint.manifest import (
    HUGGINGFACE,
    MANIFEST,
    ROUTERS,
    STATE,
    content_fingerprint,
    read_manifest,
    resolve_step,
    step_folders,
    verify_checkpoint,
)
from megatron_mod.config.lora import LoraSettings, lora_of
from megatron_mod.conversion import megatron_lm
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.families.base import Family
from megatron_mod.conversion.fused_experts import open_weights
from megatron_mod.conversion.hf_reader import TensorReader, read_config
from megatron_mod.model.architecture import Architecture
from megatron_mod.routing.config import RoutingConfig

if TYPE_CHECKING:
    from megatron_mod.config.schema import Config


REFERENCE = ("base", "base_config", "base_fingerprint")


@dataclass(frozen=True)
class Base:
    """A model on disk.

    ``kind`` says what ``path`` is: our ``checkpoint``, a ``step`` of a training of the whole model,
    a ``huggingface`` folder, a distributed checkpoint of Megatron-LM or Megatron-Bridge
    (``megatron_lm``), or a ``config`` without weights (``scratch.NewModel``). ``huggingface`` is
    the folder with config.json and tokenizer.
    """

    kind: Literal["checkpoint", "step", "huggingface", "megatron_lm", "config"]
    path: Path
    huggingface: Path
    family: Family
    arch: Architecture

    @property
    def state(self) -> Path:
        """The distributed checkpoint of the weights (not where ``weights`` reads them)."""
        return self.path / STATE if self.kind in ("checkpoint", "step") else self.path

    @property
    def has_hf_weights(self) -> bool:
        """Whether the weights have Hugging Face's names, and are read by ``weights``."""
        return self.kind in ("huggingface", "config")

    def weights(self) -> TensorReader:
        """The tensors by Hugging Face's names."""
        return open_weights(self.path, self.family, self.arch)

    def companions(self, *, dtype: str | None = None) -> dict[str, bytes]:
        """Config, tokenizer and generation settings, by file, as ``read_companions``."""
        return read_companions(self.huggingface, dtype=dtype)

    def reference(self) -> dict[str, str | None]:
        """What the manifest of a step says of its base (``REFERENCE``); called by all ranks alike,
        raises as ``fingerprint``."""
        config = str(self.huggingface.resolve()) if self.kind == "megatron_lm" else None
        return {
            "base": str(self.path.resolve()),
            "base_config": config,
            "base_fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """A name for the content of all that is read of it, checked; called by all ranks alike.

        Raises:
            ValueError: a file of our checkpoint is damaged.
        """
        if self.kind == "checkpoint":
            return content_fingerprint(verify_checkpoint(self.path))
        if self.kind == "step":
            return checksums.fingerprint(verify_checkpoint(self.path)["files"])
        if self.kind == "huggingface":
            with as_written(self.path):
                return checksums.fingerprint(
                    checksums.file_table(self.path, model_files(self.path))
                )
        names = [p.name for p in self.path.iterdir() if p.is_file()]
        beside = [name for name in COMPANION_FILES if (self.huggingface / name).is_file()]
        return checksums.fingerprint(
            checksums.file_table(self.path, names)
            | {
                f"{HUGGINGFACE}/{name}": entry
                for name, entry in checksums.file_table(self.huggingface, beside).items()
            }
        )


def open_base(
    path: str | Path, *, hf_path: str | Path | None = None, name: str = "model.hf_path"
) -> Base:
    """The frozen model a folder holds.

    Args:
        path: a folder of convert_hf_to_megatron.py, a Hugging Face folder, one that Megatron-LM
            or Megatron-Bridge wrote, or a training of the whole model, or one of its steps.
        hf_path: for the last of these, a Hugging Face folder of the same model; only its config
            and tokenizer are read.
        name: what the user calls that folder.

    Raises:
        ValueError: none of these, a damaged config or tokenizer of ours, or a model that is not
            supported.
    """
    path = Path(path)
    kind: Literal["checkpoint", "step", "huggingface", "megatron_lm"]
    if (path / "config.json").is_file() and not (path / MANIFEST).is_file():
        kind, huggingface = "huggingface", path
    elif (found := megatron_lm.find_iteration(path)) is not None:
        if hf_path is None:
            raise ValueError(
                f"{path}: a checkpoint of Megatron-LM or Megatron-Bridge does not hold the model's "
                f"config.json and tokenizer; set {name} to a Hugging Face folder with them."
            )
        kind, path, huggingface = "megatron_lm", found, Path(hf_path)
    else:
        path = resolve_step(path)
        manifest = read_manifest(path)
        kind = "step" if manifest.get("whole") else "checkpoint"
        if kind == "checkpoint":
            manifest = read_manifest(path, kind="base")
        files, huggingface = manifest["files"], path / HUGGINGFACE
        # These are small, and read before ranks meet and check the rest.
        there = {f"{HUGGINGFACE}/{p.name}" for p in huggingface.glob("*")} & files.keys()
        checksums.verify(path, {name: files[name] for name in there}, together=False)
    if hf_path is not None and kind != "megatron_lm" and Path(hf_path) != path:
        raise ValueError(
            f"{name} = {hf_path}: would be ignored, because {path} has its own config.json and "
            f"tokenizer; leave {name} out."
        )
    hf_config = read_config(huggingface)
    family = family_of(hf_config)
    arch = family.architecture_of(hf_config)
    if kind == "megatron_lm" and arch.mixture is not None:
        raise ValueError(
            f"{path}: {family.model_type}: a mixture of experts in a checkpoint of Megatron-LM or "
            "Megatron-Bridge is not read; export it to Hugging Face's format with those, and give "
            "that folder."
        )
    return Base(kind, path, huggingface, family, arch)


def holds_model(config: Config) -> bool:
    """Whether a training goes on from steps that hold the whole model, and needs no other."""
    return config.train.trainable == "all" and bool(_whole_steps(config))


def _whole_steps(config: Config) -> list[Path]:
    steps = step_folders(Path(config.checkpoint.save))
    return [step for step in steps if (step / HUGGINGFACE).is_dir()]


def open_model(config: Config) -> tuple[Base, dict | None]:
    """What a training begins with: the model that the settings name, or describe, or, of a run that
    holds the whole model and goes on, its newest step that can be read, with that step's manifest.

    Raises:
        ValueError: as ``open_base`` and ``open_new``; none of its steps can be read.
    """
    from megatron_mod.conversion.scratch import open_new  # whose models are bases too

    if holds_model(config):
        damaged = ""
        for step in _whole_steps(config):
            try:
                return open_base(step), read_manifest(step)
            except ValueError as error:  # found again later, if an earlier one can be read
                damaged = damaged or f"{error} Remove {step} to go on without it."
        raise ValueError(damaged)
    model = config.model
    if model.config is not None:
        return open_new(config), None
    return open_base(model.checkpoint or model.hf_path, hf_path=model.hf_path), None


@dataclass(frozen=True)
class Source:
    """A model to run or export: a base and, where something was added to it, the step folder with
    that, its routing and its adapters, ``None`` of what it has not."""

    base: Base
    step: Path | None = None
    routing: RoutingConfig | None = None
    lora: LoraSettings | None = None


def open_source(load: str | Path, *, base: str | Path | None = None) -> Source:
    """The model of a base checkpoint, of a training run (its newest step), or of one of its steps;
    of a run that trained the whole model, all is the step's.

    Args:
        base: where the base of a training run is now, if not where it was.

    Raises:
        ValueError: nothing of the kind, a damaged file, or a base that is not the one the routers
            were trained on.
    """
    step = resolve_step(load)
    if (step / ROUTERS).is_dir():  # a base with imported routers
        step = step / ROUTERS
    if not (step / MANIFEST).is_file() or read_manifest(step)["kind"] == "base":
        found = open_base(step)
        found.fingerprint()
        return Source(found)
    manifest = verify_checkpoint(step)
    routing = RoutingConfig.from_dict(manifest["routing"])
    if manifest.get("whole"):
        return Source(open_base(step), step, routing if routing.layers else None)
    if base is None and not (step / manifest["base"]).exists():
        raise ValueError(
            f"{(step / manifest['base']).resolve()}: the base that {load} was trained on is not "
            "there any more; say where it is now with --base DIR."
        )
    found = open_base(base or step / manifest["base"], hf_path=manifest.get("base_config"))
    check_base(found.fingerprint(), manifest, step=step, base=found.path)
    return Source(found, step, routing if routing.layers else None, lora_of(manifest))


def check_base(fingerprint: str, manifest: dict, *, step: Path, base: Path) -> None:
    """Refuse a base that is not the one a step's routers were trained on."""
    if fingerprint != manifest["base_fingerprint"]:
        raise ValueError(
            f"{base}: is not the base that the routers in {step} were trained on (its fingerprint "
            f"is {fingerprint}, theirs {manifest['base_fingerprint']}); give that one, or train "
            "new routers."
        )
