"""How fast GPUs can multiply, as their makers' data sheets have it; importing this loads nothing.

Peaks are of dense matrix products that add up in fp32. Sources are in ``estimate/gpus.py``.
"""

from __future__ import annotations

import re

TFLOPS = 10**12
PEAKS = {  # TFLOP/s in bf16 and in fp32
    "a100": (312.0, 19.5),
    "h100": (989.0, 67.0),
    "h200": (989.0, 67.0),
    "l4": (121.0, 30.3),
    "a10": (125.0, 31.2),
    "3090": (71.0, 35.6),
    "4090": (165.0, 82.6),
}
_SLOWER = {"pcie", "nvl", "laptop", "d", "ti"}  # relatives of the same name, but for an A100


def named(device: str) -> str | None:
    """The kind of GPU that a driver's name for one says, if it is a known one."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    return next((name for name in PEAKS if name in words), None)


def peak(device: str, dtype: str) -> float | None:
    """Operations a second of a device at its best in ``bfloat16`` or ``float32``.

    ``None``: it is not known, as of any CPU.
    """
    name = named(device)
    others = _SLOWER.intersection(re.findall(r"[a-z]+", device.lower()))
    if name is None or (others and name != "a100"):
        return None
    return PEAKS[name][dtype != "bfloat16"] * TFLOPS
