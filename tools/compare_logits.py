"""Compare the logits of Megatron checkpoints with those of Hugging Face folders, in fp32."""

import prologue  # noqa: F401

from megatron_mod.commands.compare_logits import main

if __name__ == "__main__":
    main()
