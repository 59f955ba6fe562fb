"""Tell whether a training can run on this machine."""

import prologue  # noqa: F401

from megatron_mod.commands.doctor import main

if __name__ == "__main__":
    main()
