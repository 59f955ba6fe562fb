"""Time prefill and decode of an export beside its original and the ideal."""

import prologue  # noqa: F401

from megatron_mod.commands.benchmark_inference import main

if __name__ == "__main__":
    main()
