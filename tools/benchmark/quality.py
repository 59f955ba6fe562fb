"""Train every granularity and scope on one model and put each beside the best static removal."""

import prologue  # noqa: F401

from megatron_mod.commands.benchmark_quality import main

if __name__ == "__main__":
    main()
