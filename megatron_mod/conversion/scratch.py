"""A model that is trained from scratch: what ``model.config`` and the tokenizer make of it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mod.checkpoint import checksums
from megatron_mod.checkpoint.companions import COMPANION_FILES, member
from megatron_mod.config.mistakes import nearest
from megatron_mod.config.schema import Config
from megatron_mod.conversion.config_types import DECODER, MODEL, check_types
from megatron_mod.conversion.families import family_of
from megatron_mod.conversion.families.base import Family
from megatron_mod.conversion.hf_reader import read_config, read_config_file
from megatron_mod.conversion.initial import InitialWeights
from megatron_mod.conversion.source import Base
from megatron_mod.data.tokenizer import SENTENCEPIECE, has_tokenizer, open_tokenizer
from megatron_mod.model.architecture import Architecture

FIELD = "model.config"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_OF_TOKENIZERS = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class NewModel(Base):
    """A model of no weights but those that ``seed`` gives; ``huggingface`` is its tokenizer's
    folder, or file, and ``hf_config`` what its ``config.json`` will hold."""

    hf_config: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0

    def reference(self) -> dict[str, str | None]:
        """What the manifest of a step says of its base: nothing but what it was."""
        return {"base": None, "base_config": None, "base_fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """A name for shape, seed and tokenizer; called by all ranks alike."""
        begin = [
            self.family.model_type, dataclasses.asdict(self.arch), self._range, self.seed
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(begin, sort_keys=True).encode())
        folder, names = self._tokenizer_files()
        for name, entry in checksums.file_table(folder, names.values()).items():
            digest.update(f"{name} {entry}\n".encode())
        return digest.hexdigest()[:32]

    def weights(self) -> InitialWeights:
        """The first weights, the same at every topology."""
        return InitialWeights(self.family, self.arch, initializer_range=self._range, seed=self.seed)

    def companions(self, *, dtype: str | None = None) -> dict[str, bytes]:
        """config.json and tokenizer as a Hugging Face folder has them, by file."""
        folder, names = self._tokenizer_files()
        found = {name: member(folder, source).read_bytes() for name, source in names.items()}
        values = {**self.hf_config, **({"dtype": dtype} if dtype else {})}
        found["config.json"] = (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
        return found

    @property
    def _range(self) -> float:
        return float(self.hf_config["initializer_range"])  # type: ignore[arg-type]

    def _tokenizer_files(self) -> tuple[Path, dict[str, str]]:
        """Their folder, and there by the name that each will have."""
        place = self.huggingface
        if place.is_file():
            return place.parent, {SENTENCEPIECE: place.name}
        names = [n for n in COMPANION_FILES if n not in _NOT_OF_TOKENIZERS]
        return place, {name: name for name in names if (place / name).is_file()}


def open_new(config: Config) -> NewModel:
    """The model that ``model.config`` describes.

    Raises:
        ValueError: naming the field: a shape that cannot be, or is not supported, or no tokenizer.
    """
    fields, place = _fields(config), tokenizer_place(config)
    tokenizer = open_tokenizer(place)
    own = {name: getattr(tokenizer, name) for name in _TOKENS}
    if config.data.tokenizer and isinstance(config.model.config, str):  # the file's are another's
        fields = {name: value for name, value in fields.items() if name not in own}
    fields = {"vocab_size": len(tokenizer), **own, **fields}
    family, arch, hf_config = _resolve(fields, config)
    if arch.vocab_size < len(tokenizer):
        raise ValueError(
            f"{FIELD}: vocab_size = {arch.vocab_size}: the tokenizer in {place} knows "
            f"{len(tokenizer)} tokens; give as many or more, or leave it out."
        )
    path = Path(config.model.config) if isinstance(config.model.config, str) else Path(FIELD)
    return NewModel(
        "config", path, place, family, arch, hf_config=hf_config, seed=config.train.seed
    )


def new_architecture(config: Config) -> Architecture:
    """The shape of that model; its tokenizer is read only if it says the size of the vocabulary.

    Raises:
        ValueError: as ``open_new``.
    """
    fields = _fields(config)
    if fields.get("vocab_size") is None:
        return open_new(config).arch
    return _resolve(fields, config)[1]


def tokenizer_place(config: Config) -> Path:
    """The folder, or file, with the tokenizer of that model.

    Raises:
        ValueError: nothing names one.
    """
    given = config.model.config
    if config.data.tokenizer:
        return Path(config.data.tokenizer)
    if isinstance(given, str) and has_tokenizer(folder := _folder(given)):
        return folder
    raise ValueError(
        "data.tokenizer: must be set, because model.config comes with no tokenizer; give the "
        "folder of a Hugging Face tokenizer, or a SentencePiece .model file."
    )


def _folder(given: str) -> Path:
    return Path(given) if Path(given).is_dir() else Path(given).parent


def _fields(config: Config) -> dict:
    """What is given of ``config.json``."""
    given = config.model.config
    if isinstance(given, dict):
        check_types(given, Path(FIELD))
        _check_names(given)
        return given
    assert given is not None, "a configuration of no new model"
    path = Path(given)
    if not path.exists():
        raise ValueError(
            f"{FIELD} = {given}: no such file or folder; give a config.json, a folder with one, or "
            "its fields ({model_type: llama, hidden_size: 256, ...})."
        )
    return read_config(path) if path.is_dir() else read_config_file(path)


def _check_names(given: dict) -> None:
    known = {*_defaults(_family_of(given)), *DECODER, *MODEL}
    for name in given:
        if name not in known:
            raise ValueError(
                f"{FIELD}.{name} = {given[name]!r}: no field of a {given['model_type']} "
                f"config.json; did you mean {nearest(str(name), sorted(known))}?"
            )


def _resolve(fields: dict, config: Config) -> tuple[Family, Architecture, dict]:
    """Of fields of a ``config.json``, what is left out having the defaults of the family's class in
    Transformers."""
    family = _family_of(fields)
    fields = {"max_position_embeddings": config.data.max_length, **fields}
    fields = {name: value for name, value in fields.items() if value is not None}
    defaults = _defaults(family)
    with _named(config, fields):
        # Before Transformers fills in what follows from other fields, such as head_dim.
        family.architecture_of({**defaults, **fields})
        kind = _config_class(family)
        fields = {**fields, "architectures": [family.architecture]}
        try:
            hf_config = json.loads(kind(**fields).to_json_string())
        except Exception as error:  # its releases check with classes of their own
            raise ValueError(f"config.json: {' '.join(str(error).split())}") from error
        return family, family.architecture_of(hf_config), hf_config


def _family_of(fields: Mapping[str, object]) -> Family:
    """As ``family_of``, of ``model.config``."""
    try:
        return family_of(dict(fields))
    except ValueError as error:
        raise ValueError(f"{FIELD}: {str(error).removeprefix('config.json: ')}") from error


@contextlib.contextmanager
def _named(config: Config, fields: Mapping[str, object]) -> Iterator[None]:
    """Call ``config.json`` what the user calls it."""
    given = config.model.config
    try:
        yield
    except ValueError as error:
        what = str(error).removeprefix("config.json: ")
        if what.partition(" ")[0] not in fields:
            what += f" (That is {fields['model_type']}'s default in Transformers; set it.)"
        place = f" = {given}" if isinstance(given, str) else ""
        raise ValueError(f"{FIELD}{place}: {what}") from error


def _config_class(family: Family):
    from transformers import CONFIG_MAPPING  # seconds: only for those who train from scratch

    return CONFIG_MAPPING[family.model_type]


def _defaults(family: Family) -> dict[str, object]:
    """Of the fields of the family's ``config.json``, as its class in Transformers has them."""
    parameters = inspect.signature(_config_class(family)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind != p.VAR_KEYWORD}
