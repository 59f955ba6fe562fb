"""Write a Megatron checkpoint, with the routers trained on it if any, as a Hugging Face folder."""

import prologue  # noqa: F401

from megatron_mod.commands.convert_megatron_to_hf import main

if __name__ == "__main__":
    main()
