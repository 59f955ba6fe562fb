"""Imported by every script for its effect: the package of this checkout is the one that runs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
