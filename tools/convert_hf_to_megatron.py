"""Write a local Hugging Face model folder as a Megatron checkpoint for any TP and PP."""

import prologue  # noqa: F401

from megatron_mod.commands.convert_hf_to_megatron import main

if __name__ == "__main__":
    main()
