"""A JSON lines file as tokenised samples."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from megatron_mod.data.chat import Sample, messages_of, tokenize

logger = logging.getLogger(__name__)


def load_samples(path: str | Path, tokenizer, *, max_length: int) -> list[Sample]:
    """Every usable sample of a file, in file order.

    A sample whose answer ``max_length`` cuts away entirely is left out and counted in the log.

    Raises:
        ValueError: no such file; a bad line (with file, line and reason); no usable sample.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a JSON lines file.")
    samples, cut = [], 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            source = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                messages = messages_of(json.loads(line.decode("utf-8")))
                sample = tokenize(messages, tokenizer, max_length=max_length, source=source)
            except json.JSONDecodeError as error:
                raise ValueError(f"{source}: not JSON: {error}") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{source}: not UTF-8: {error}") from error
            except ValueError as error:
                raise ValueError(f"{source}: {error}.") from error
            if sample.num_labels == 0:
                cut += 1
            else:
                samples.append(sample)
    if cut:
        logger.warning(
            "%s: %d of %d samples left out: data.max_length = %d cuts their answers away.",
            path, cut, cut + len(samples), max_length,
        )  # fmt: skip
    if not samples:
        raise ValueError(f"{path}: no usable sample.")
    return samples
