"""Mix reformatted corpora into one shuffled file, each in its portion."""

import prologue  # noqa: F401

from megatron_mod.commands.mix_datasets import main

if __name__ == "__main__":
    main()
