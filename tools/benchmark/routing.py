"""Time a routed layer of each granularity against the dense layer."""

import prologue  # noqa: F401

from megatron_mod.commands.benchmark_routing import main

if __name__ == "__main__":
    main()
