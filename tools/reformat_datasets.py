"""Bring raw instruction corpora to JSON lines of messages."""

import prologue  # noqa: F401

from megatron_mod.commands.reformat_datasets import main

if __name__ == "__main__":
    main()
