"""Write questions and answers from Python's own documentation as JSON lines."""

import prologue  # noqa: F401

from megatron_mod.commands.make_python_docs import main

if __name__ == "__main__":
    main()
