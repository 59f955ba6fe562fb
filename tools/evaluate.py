"""Perplexity and lm-eval tasks of a Hugging Face folder or of a Megatron checkpoint."""

import prologue  # noqa: F401

from megatron_mod.commands.evaluate import main

if __name__ == "__main__":
    main()
