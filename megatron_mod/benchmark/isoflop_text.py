"""The text of models that are trained from scratch for a benchmark, and a tokenizer made of it."""

from __future__ import annotations

from pathlib import Path

from megatron_mod.checkpoint.folders import new_folder, write_durably
from megatron_mod.data import python_docs

HELD_OUT = 20  # a twentieth of the text, its end
TRAIN, VALIDATION, TOKENIZER = "train.txt", "validation.txt", "tokenizer"
END = "<|endoftext|>"


def write_text(out: Path, text: Path | None) -> None:
    """Part a text, or Python's documentation, into ``out``'s files to train and to validate on.

    Raises:
        ValueError: no UTF-8, next to no text, or files that hold another text's parts.
    """
    try:
        whole = python_text() if text is None else text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {text}: not UTF-8: {error}.") from error
    end = len(whole) - len(whole) // HELD_OUT
    end = whole.rfind(" ", 0, end) + 1 or end
    for name, part in ((TRAIN, whole[:end]), (VALIDATION, whole[end:])):
        path = out / name
        if not part.strip():
            raise ValueError(f"--text {text}: too short to be parted; give more text.")
        if path.is_file() and path.read_bytes() != part.encode():
            raise ValueError(
                f"--out {out}: {path} is of another text; give that text, or another folder."
            )
        write_durably(path, part)


def python_text() -> str:
    """The documentation that every Python carries: its library's, and the language's."""
    answers = [record["completion"] for record in python_docs.records()]
    return "\n\n".join([python_docs.topic_text(), *answers])


def make_tokenizer(out: Path, *, vocabulary: int) -> Path:
    """A byte-level BPE of the training text, of so many tokens or fewer, unless ``out`` has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = out / f"{TOKENIZER}_{vocabulary}"
    if folder.is_dir():
        return folder
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(out / TRAIN)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    with new_folder(folder) as partial:
        fast.save_pretrained(partial)
    return folder
