"""Measure how fast data is prepared and dealt, and how much of it is padding."""

import prologue  # noqa: F401

from megatron_mod.commands.benchmark_data import main

if __name__ == "__main__":
    main()
