"""The folders models lie in, told apart by their files before anything reads them."""

from __future__ import annotations

from pathlib import Path

MANIFEST = "megatron_mod.json"  # of a base checkpoint, and of each step of a training
HUGGINGFACE = "huggingface"  # of a base checkpoint: config.json and tokenizer
LATEST = "latest"  # of a training: the name of its newest step's folder
CONFIG = "config.yaml"  # of a training: the resolved configuration
ADAPTER = "adapter_config.json"  # of a folder that PEFT wrote
LORA = "lora"  # such a folder in an export whose weights are without its adapters
_OF_MEGATRON_LM = ("latest_checkpointed_iteration.txt", "metadata.json", ".metadata")


def is_megatron(folder: str | Path) -> bool:
    """Whether a folder is a checkpoint of ours rather than a Hugging Face folder."""
    named = any(Path(folder, name).is_file() for name in (MANIFEST, LATEST))
    return named or _has_steps(folder)


def _has_steps(folder: str | Path) -> bool:
    """Whether checkpoints of a training are there, whatever became of its ``latest``."""
    return any(Path(folder).glob(f"step_*/{MANIFEST}"))


def is_started_run(folder: str | Path) -> bool:
    """Whether a training is at work there, or was, that has not saved a checkpoint."""
    return Path(folder, CONFIG).is_file() and not is_megatron(folder)


def is_run(folder: str | Path) -> bool:
    """Whether a folder is a training run, or one of its steps, which have a base elsewhere: not
    where the whole model was trained, which each step then holds."""
    if Path(folder, MANIFEST).is_file():
        return not Path(folder, HUGGINGFACE).is_dir()
    if any(Path(folder).glob(f"step_*/{HUGGINGFACE}")):
        return False
    return Path(folder, LATEST).is_file() or _has_steps(folder)


def check_base(base: str | None, *loads: str) -> None:
    """Refuse a place of the base where nothing that is loaded has one.

    Raises:
        ValueError: naming the option.
    """
    if base is not None and not any(map(is_run, loads)):
        raise ValueError(
            f"--base {base}: would be ignored, because {' '.join(loads)} is not a training run "
            "whose base lies elsewhere; leave it out."
        )


NOT_SAVED = (
    "this training has not saved a checkpoint yet; wait for its first, or run its command again"
)


def adapter_problem(folder: str | Path) -> str | None:
    """Why a folder is no model, whatever else lies in it, if PEFT wrote an adapter there."""
    if not Path(folder, ADAPTER).is_file():
        return None
    return (
        f"holds a PEFT adapter ({ADAPTER}), which is no model; give the model it was made for (and "
        f"a training the adapter as model.lora), or take {ADAPTER} out if a whole model is here too"
    )


class ModelFolder:
    """A Hugging Face folder, a base checkpoint, a training run or one of its steps."""

    def problem(self, value: str) -> str | None:
        if is_started_run(value):
            return NOT_SAVED
        if problem := adapter_problem(value):
            return problem
        if is_megatron(value) or Path(value, "config.json").is_file():
            return None
        if any(Path(value, name).is_file() for name in _OF_MEGATRON_LM):
            return None  # what reads it says what is missing
        what = "neither" if Path(value).is_dir() else "no such folder; give"
        nor = "nor" if what == "neither" else "or"
        return (
            f"{what} a Hugging Face folder (config.json) {nor} a checkpoint that "
            "tools/convert_hf_to_megatron.py or launch/pretrain_router.py wrote"
        )


class HuggingFaceFolder:
    """A folder with a Hugging Face model."""

    def problem(self, value: str) -> str | None:
        if problem := adapter_problem(value):
            return problem
        if Path(value, "config.json").is_file():
            return None
        what = "has no config.json" if Path(value).is_dir() else "no such folder"
        return f"{what}; give a Hugging Face model folder"


class TrainingRun:
    """``checkpoint.save`` of a training, whether it has saved a checkpoint or not."""

    def problem(self, value: str) -> str | None:
        if Path(value, CONFIG).is_file():
            return None
        what = "holds no training run" if Path(value).is_dir() else "no such folder"
        return (
            f"{what}; give the checkpoint.save folder of a training (with {CONFIG} and "
            "metrics.jsonl)"
        )
