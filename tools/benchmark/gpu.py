"""Measure what routers save on one GPU."""

import prologue  # noqa: F401

from megatron_mod.commands.benchmark_gpu import main

if __name__ == "__main__":
    main()
