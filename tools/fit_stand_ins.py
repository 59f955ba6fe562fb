"""Solve what skipped units add, in closed form, before routers are trained."""

import prologue  # noqa: F401

from megatron_mod.commands.fit_stand_ins import main

if __name__ == "__main__":
    main()
