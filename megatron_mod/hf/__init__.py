"""The code that an export carries: every ``*_mod.py`` of this folder, under its own name.

It imports ``torch`` and ``transformers``, and nothing of this package but the files beside it.
"""

from __future__ import annotations

from pathlib import Path

MODULE = "modeling_mod"  # where Transformers finds the classes of an export
FILES = tuple(sorted(Path(__file__).parent.glob("*_mod.py")))


def routed_name(model_type: str) -> str:
    """What a family's routed classes are called before ``Config``, ``Model`` or ``ForCausalLM``."""
    return "MoD" + "".join(part.capitalize() for part in model_type.split("_"))
