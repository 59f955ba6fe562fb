"""Measure an export against the untouched original; write report.json and print a table."""

import prologue  # noqa: F401

from megatron_mod.commands.quickstart_report import main

if __name__ == "__main__":
    main()
