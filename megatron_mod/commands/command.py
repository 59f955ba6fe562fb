"""What all commands have in common."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from megatron_mod.config.options import Options, parse_options
from megatron_mod.config.ranks import OPTIONS, Degrees, check_ranks
from megatron_mod.process import is_first_rank, one_message

if TYPE_CHECKING:
    from megatron_mod.parallel.topology import Topology

Schema = TypeVar("Schema", bound=Options)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def command(
    schema: type[Schema], arguments: Sequence[str] | None = None, *, network: bool = False
) -> Iterator[Schema]:
    """A command's options, for what it does with them; a mistake ends it with one message.

    ``network``: whether libraries may ask a network that may not answer.
    """
    with mistakes_told(network=network):
        yield parse_options(schema, arguments)


@contextlib.contextmanager
def mistakes_told(*, network: bool = False) -> Iterator[None]:
    """End with one message what a user can mend, files that cannot be read or written included."""
    if not network:  # before the libraries read it
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if not is_first_rank():  # one progress bar
        os.environ["TQDM_DISABLE"] = "1"
    with one_message():
        try:
            yield
        except OSError as error:
            if error.filename is None and error.errno not in _DISK_FULL:
                raise
            at = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
            raise ValueError(f"{at}{error.strerror}.") from error


@contextlib.contextmanager
def ranks(options: Degrees, *, with_megatron: bool = True) -> Iterator[Topology]:
    """Join the ranks that ``torchrun`` started, for the block.

    ``with_megatron``: whether they run Megatron-core, whose import takes seconds.

    Raises:
        ValueError: degrees that do not divide them.
    """
    degrees = {"tensor": options.tensor, "pipeline": options.pipeline}
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    expert = options.expert
    # Before torch is imported.
    check_ranks(degrees, world_size=world_size, expert=expert, names=OPTIONS)
    from megatron_mod.parallel import topology

    found = topology.plan(**degrees, world_size=world_size, expert=expert)
    with topology.joined(found, with_megatron=with_megatron):
        yield found
