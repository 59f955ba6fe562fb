"""The tokenizer that belongs to a model."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import AutoTokenizer, LlamaTokenizerFast

SENTENCEPIECE = "tokenizer.model"


def load_tokenizer(source: str | Path, *, vocab_size: int):
    """A Hugging Face tokenizer folder, or a SentencePiece ``.model`` file (Llama 2, Mistral) or a
    folder with nothing but one.

    Raises:
        ValueError: there is none, it gives no offsets, it has no end-of-text token, or it knows
            more tokens than the model's ``vocab_size``.
    """
    path = Path(source)
    bare = path / SENTENCEPIECE
    if path.suffix == ".model" and path.is_file():
        tokenizer = _from_sentencepiece(path)
    elif bare.is_file() and not any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    ):
        tokenizer = _from_sentencepiece(bare)
    else:
        tokenizer = _from_folder(path)
    if not tokenizer.is_fast:
        raise ValueError(f"{path}: a fast tokenizer (tokenizer.json) is needed for offsets.")
    if tokenizer.eos_token is None:
        raise ValueError(f"{path}: the tokenizer has no end-of-text token (eos_token).")
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{path}: the tokenizer knows {len(tokenizer)} tokens, but the model only "
            f"{vocab_size} (vocab_size); they do not belong together."
        )
    return tokenizer


def _from_folder(folder: Path):
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: no tokenizer that Transformers can load ({str(error).splitlines()[0]}); "
            "put the model's tokenizer files into the Hugging Face folder and convert again, or "
            "set data.tokenizer."
        ) from error


def _from_sentencepiece(path: Path):
    """Transformers' Llama tokenizer around the model: beginning of text first, no word border
    after a special token (``legacy=False``) or before a space that begins the text, else what
    SentencePiece itself gives."""
    _require_plain_bpe(path)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / SENTENCEPIECE).symlink_to(path.resolve())
        try:
            return LlamaTokenizerFast.from_pretrained(folder, legacy=False, add_bos_token=True)
        except Exception as error:  # of pieces that are none: whatever the libraries break on
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{path}: a damaged SentencePiece model ({type(error).__name__}: {reason}); "
                "replace it."
            ) from error


def _require_plain_bpe(path: Path) -> None:
    """Refuse models that Llama's tokenizer would read as something else."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
        SentencePieceProcessor().LoadFromSerializedProto(path.read_bytes())
    except Exception as error:  # protobuf's own has moved between its releases
        raise ValueError(f"{path}: is not a SentencePiece model ({error}).") from error
    spec, normalizer = model.trainer_spec, model.normalizer_spec
    if spec.model_type != spec.BPE:
        kind = spec.ModelType.Name(spec.model_type)
        raise ValueError(
            f"{path}: is a {kind} model; only BPE ones (Llama 2, Mistral) are read directly. Give "
            "the folder of a Hugging Face tokenizer."
        )
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise ValueError(
            f"{path}: rewrites its text ({normalizer.name}) before it tokenises, which is not "
            "built for .model files. Give the folder of a Hugging Face tokenizer."
        )
