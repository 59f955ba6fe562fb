"""Save SmolLM2-135M-Instruct as an ordinary Hugging Face folder."""

import prologue  # noqa: F401

from megatron_mod.commands.get_smollm2 import main

if __name__ == "__main__":
    main()
