"""Train Mixture-of-Depths routers into a language model, frozen or whole."""

import prologue  # noqa: F401

from megatron_mod.commands.train import main

if __name__ == "__main__":
    main()
