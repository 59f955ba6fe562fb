"""Convert a random Llama-shaped folder both ways: speed and memory beside a plain copy."""

import prologue  # noqa: F401

from megatron_mod.commands.benchmark_conversion import main

if __name__ == "__main__":
    main()
