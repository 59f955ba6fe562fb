"""What a user wants evaluated, and how."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

TEXT_LENGTH = 2048  # tokens a perplexity's text is cut to where nobody says


@dataclass(frozen=True)
class Request:
    """The settings of one evaluation.

    Args:
        load: a Hugging Face folder (export or dense), a base checkpoint, or a training run.
        perplexity: conversations (``.jsonl``), whose answers are scored, or a text.
        tasks: names of lm-eval tasks.
        include_path: folder with files of tasks.
        num_fewshot: examples before each question (``None``: as the task says).
        limit: so many documents of each task (``None``: all).
        apply_chat_template: ask in the model's chat format.
        pooling: what a sequence's decision sees of a scored text: its context (``prompt``, the
            default), as in generation, or ``all`` of it. Windows of a running text have no context
            to speak of; there ``all`` is the default.
        batch_size: texts run together.
        max_length: most tokens of a text (``None``: as many as the model has positions, for a
            perplexity at most ``TEXT_LENGTH``).
        dtype: ``float32`` or ``bfloat16``.
        tensor, pipeline: parallel degrees, of a Megatron checkpoint.
        json: file the report is written to.
        trust_remote_code: run the code that a Hugging Face folder brings (an export of ours needs
            no trust).

    Raises:
        ValueError: nothing to evaluate, or a setting that would be ignored.
    """

    load: str
    perplexity: str | None = None
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    pooling: str | None = None
    batch_size: int = 1
    max_length: int | None = None
    dtype: str = "float32"
    tensor: int = 1
    pipeline: int = 1
    json: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.tasks and not self.perplexity:
            raise ValueError(
                "nothing to evaluate: give --perplexity FILE or --tasks NAME, or both."
            )
        for name in ("include_path", "num_fewshot", "limit", "apply_chat_template"):
            if getattr(self, name) not in (None, False) and not self.tasks:
                raise ValueError(f"--{name} belongs to --tasks; leave it out, or name a task.")
        if self.tasks and find_spec("lm_eval") is None:
            raise ValueError("--tasks needs lm-eval: pip install -e .[eval] in this repository.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit}: must be at least 1.")
        if self.perplexity and not Path(self.perplexity).is_file():
            raise ValueError(f"--perplexity {self.perplexity}: no such file.")
        if self.json and not Path(self.json).absolute().parent.is_dir():
            raise ValueError(f"--json {self.json}: its folder does not exist; make it first.")
        check_load(self.load, tensor=self.tensor, pipeline=self.pipeline)
        if self.trust_remote_code and is_megatron(self.load):
            raise ValueError(
                f"--trust-remote-code: {self.load} is a Megatron checkpoint, which has no code; "
                "leave it out."
            )

    def to_dict(self) -> dict:
        return asdict(self)


def is_megatron(load: str | Path) -> bool:
    """Whether a folder is a checkpoint of ours rather than a Hugging Face folder."""
    folder = Path(load)
    named = any((folder / name).is_file() for name in ("megatron_mod.json", "latest"))
    return named or any(folder.glob("step_*/megatron_mod.json"))


def check_load(load: str, *, tensor: int, pipeline: int) -> None:
    """Refuse a folder that cannot be run, or not in this way.

    Raises:
        ValueError: neither kind of folder, or parallel degrees for a Hugging Face one.
    """
    if is_megatron(load):
        return
    if not Path(load, "config.json").is_file():
        raise ValueError(
            f"--load {load}: neither a Hugging Face folder (config.json) nor a checkpoint "
            "that tools/convert_hf_to_megatron.py or launch/pretrain_router.py wrote."
        )
    if tensor * pipeline > 1:
        raise ValueError(
            f"--tensor {tensor} --pipeline {pipeline}: a Hugging Face folder is run whole on "
            "every rank; leave them out, or load the Megatron checkpoint."
        )
