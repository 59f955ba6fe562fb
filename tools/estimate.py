"""What a training will need of machines, and how long a step takes, without running it."""

import prologue  # noqa: F401

from megatron_mod.commands.estimate import main

if __name__ == "__main__":
    main()
