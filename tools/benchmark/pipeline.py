"""Measure training steps at an even cut of the pipeline and at the one that is the default."""

import prologue  # noqa: F401

from megatron_mod.commands.benchmark_pipeline import main

if __name__ == "__main__":
    main()
