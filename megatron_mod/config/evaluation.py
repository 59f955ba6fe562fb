"""What a user wants evaluated, and how."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Literal

from megatron_mod.config.model_folder import ModelFolder, check_base, is_megatron
from megatron_mod.config.options import option
from megatron_mod.config.ranks import OPTIONS, RankOptions
from megatron_mod.config.rules import AT_LEAST_0, COUNT, InputFile, InputFolder, OutputFile, setting

SELECTIONS = ("causal", "top_k")  # of routers that keep exactly so many of a text's tokens
TEXT_LENGTH = 2048  # tokens a perplexity's text is cut to where nobody says


@dataclass(frozen=True)
class Request(RankOptions):
    """Perplexity and lm-eval tasks of a Hugging Face folder or of a Megatron checkpoint.

        python tools/evaluate.py --load EXPORT_DIR --perplexity FILE
        torchrun --standalone --nproc_per_node N tools/evaluate.py --load DIR --tensor T \\
            --pipeline P --tasks NAME ... --include_path DIR --json FILE

    The ranks that tensor x pipeline leave over share the texts. Nothing is downloaded.

    Args:
        load: a Hugging Face folder (export or dense), a base checkpoint, or a training run.
        perplexity: conversations (.jsonl), whose answers are scored, or a text.
        tasks: names of lm-eval tasks, also separated by commas.
        include_path: folder with files of tasks.
        num_fewshot: examples before each question; unset: as the task says.
        limit: so many documents of each task; unset: all.
        apply_chat_template: ask in the model's chat format.
        pooling: what a sequence's decision sees of a scored text: its context (`prompt`, the
            default), as in generation, or `all` of it. Windows of a running text have no context
            to speak of; there `all` is the default.
        selection: with routers that keep exactly so many of a text's tokens (router.selection:
            top_k), what decides: the `causal` rule (the default), as in generation, or `top_k`, as
            in training, which sees the whole of a scored text. A perplexity is reported by both.
        batch_size: texts run together.
        max_length: most tokens of a text; unset: as many as the model has positions, for a
            perplexity at most 2048.
        dtype: what weights and activations are held in.
        json: also write the report to this file.
        trust_remote_code: run the code that a Hugging Face folder brings (an export needs no
            trust).

    Raises:
        ValueError: nothing to evaluate, or a setting that would be ignored.
    """

    load: str = setting(ModelFolder(), aliases=("--hf-path",))
    perplexity: str | None = setting(InputFile(), default=None)
    tasks: tuple[str, ...] = ()
    include_path: str | None = setting(InputFolder(), default=None)
    num_fewshot: int | None = setting(AT_LEAST_0, default=None)
    limit: int | None = setting(COUNT, default=None)
    apply_chat_template: bool = False
    pooling: Literal["prompt", "all"] | None = None
    selection: Literal["causal", "top_k"] | None = None
    batch_size: int = setting(COUNT, default=1)
    max_length: int | None = setting(COUNT, default=None)
    dtype: Literal["float32", "bfloat16"] = "float32"
    json: str | None = setting(OutputFile(), default=None)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        tasks = tuple(name for entry in self.tasks for name in entry.split(",") if name)
        object.__setattr__(self, "tasks", tasks)
        if not self.tasks and not self.perplexity:
            raise ValueError(
                "nothing to evaluate: give --perplexity FILE or --tasks NAME, or both."
            )
        for name in ("include_path", "num_fewshot", "limit", "apply_chat_template"):
            if getattr(self, name) not in (None, False) and not self.tasks:
                raise ValueError(
                    f"{option(name)} belongs to --tasks; leave it out, or name a task."
                )
        super().__post_init__()
        if self.tasks and find_spec("lm_eval") is None:
            raise ValueError("--tasks needs lm-eval: pip install -e .[eval] in this repository.")
        check_load(self)
        if self.trust_remote_code and is_megatron(self.load):
            raise ValueError(
                f"--trust-remote-code: {self.load} is a Megatron checkpoint, which has no code; "
                "leave it out."
            )

    def to_dict(self) -> dict:
        return asdict(self)


def check_load(request: RankOptions) -> None:
    """Refuse what the kind of folder that ``load`` names has no use for.

    Raises:
        ValueError: naming the options.
    """
    degrees = {name: getattr(request, name) for name in OPTIONS}
    if math.prod(degrees.values()) > 1 and not is_megatron(request.load):
        given = " ".join(f"{OPTIONS[name]} {value}" for name, value in degrees.items() if value > 1)
        raise ValueError(
            f"{given}: a Hugging Face folder is run whole on every rank, which shares nothing; set "
            "degrees to 1 or leave them out, or load the Megatron checkpoint."
        )
    check_base(request.base, request.load)
