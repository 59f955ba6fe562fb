"""Set a routed model's thresholds so that it meets a budget, and show what every budget costs."""

import prologue  # noqa: F401

from megatron_mod.commands.calibrate_router import main

if __name__ == "__main__":
    main()
