"""Write a training run as one self-contained HTML page."""

import prologue  # noqa: F401

from megatron_mod.commands.report import main

if __name__ == "__main__":
    main()
