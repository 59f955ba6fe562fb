"""What a device tells the host, asked for before it is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Answers:
    """Memory of the host for what a device says, one answer after another."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.filled: Any = None  # the event

    @staticmethod
    def are_late(device: torch.device) -> bool:
        """Whether the host has to wait for what a device says."""
        return device.type == "cuda"

    def ask(self, values: Tensor) -> Callable[[], Tensor]:
        """What waits for ``values`` and returns them on the host; what is launched before it is
        called does not delay them."""
        if values.device.type == "cpu":
            return values.clone
        if self.memory is None or self.memory.shape != values.shape:
            with torch.inference_mode(False):
                self.memory = torch.empty_like(values, device="cpu", pin_memory=True)
            self.filled = torch.cuda.Event()
        memory, filled = self.memory, self.filled
        memory.copy_(values, non_blocking=True)
        filled.record(torch.cuda.current_stream(values.device))

        def answer() -> Tensor:
            filled.synchronize()
            return memory.clone()  # the next one overwrites it

        return answer
