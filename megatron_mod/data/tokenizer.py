"""The tokenizer that belongs to a model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer


def load_tokenizer(folder: str | Path, *, vocab_size: int):
    """The Hugging Face tokenizer of a folder.

    Raises:
        ValueError: there is none, it gives no offsets, it has no end-of-text token, or it knows
            more tokens than the model's ``vocab_size``.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: no tokenizer that Transformers can load ({str(error).splitlines()[0]}); "
            "put the model's tokenizer files into the Hugging Face folder and convert again."
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: a fast tokenizer (tokenizer.json) is needed for offsets.")
    if tokenizer.eos_token is None:
        raise ValueError(f"{folder}: the tokenizer has no end-of-text token (eos_token).")
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer knows {len(tokenizer)} tokens, but the model only "
            f"{vocab_size} (vocab_size); they do not belong together."
        )
    return tokenizer
