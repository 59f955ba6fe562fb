"""Time trainings of routers: the published way, full fine-tuning, and ours, in turn."""

import prologue  # noqa: F401

from megatron_mod.commands.benchmark_training import main

if __name__ == "__main__":
    main()
