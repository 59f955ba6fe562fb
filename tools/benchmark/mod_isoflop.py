"""Train dense and Mixture-of-Depths models from scratch at equal training FLOPs."""

import prologue  # noqa: F401

from megatron_mod.commands.benchmark_mod_isoflop import main

if __name__ == "__main__":
    main()
