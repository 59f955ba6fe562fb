"""CUDA graphs of decode steps.

``run`` records work when it is first asked for, and repeats it later; all graphs of a batch size
work in the same memory (``buffers_mod.py``), the residual stream in place. ``step_mod.py`` says
what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .answers_mod import Answers
from .buffers_mod import AHEAD, Buffers, capacity_for
from .cache_mod import Choice


class DecodingGraphs:
    """The graphs of a model's layers, and the memory that they share."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.steps: dict[int, Any] = {}  # of each layer, its ``DecodeStep``
        self.buffers: dict[Hashable, Buffers] = {}
        self.filled: Buffers | None = None  # those of the latest forward call
        self.decisions: dict[Hashable, tuple[dict[str, Choice], Tensor]] = {}
        self.pool: Any = None  # of the graphs' own memory
        self.stream: Any = None  # on which they are recorded
        self.answers = Answers()

    @staticmethod
    def work_on(device: torch.device) -> bool:
        """Whether there are graphs on a device."""
        return device.type == "cuda"

    def enter(
        self,
        call: Any,
        hidden_states: Tensor,
        rotary: Sequence[Tensor],
        heads: Sequence[int],
        tokens: int,
    ) -> Buffers:
        """The buffers of a batch, which hold a layer's input ``[B, 1, H]`` now; ``call``: the
        forward call's ``RoutingCall``; ``heads``: groups, heads of each, and their channels;
        ``tokens``: before this one in the layer's cache."""
        if self.filled is None or self.filled.filled_for is not call:
            groups, _, channels = heads
            token = hidden_states[..., 0].nbytes * groups * channels  # of keys
            capacity = capacity_for(tokens + 1)
            if capacity * token > AHEAD:
                capacity = 0
            key = (*hidden_states.shape, *rotary[0].shape, hidden_states.dtype)
            if key not in self.buffers or self.buffers[key].places < capacity:
                if key in self.buffers and hidden_states.is_cuda:
                    torch.cuda.synchronize(hidden_states.device)  # graphs go that may be running
                self.pool = None  # it ends with the last graph in it, and is not to be used again
                places = min(2 ** (capacity - 1).bit_length(), AHEAD // token) if capacity else 0
                self.buffers[key] = Buffers(hidden_states, rotary, heads, places)
            self.filled = self.buffers[key]
            self.filled.fill(call, rotary, tokens, capacity)
        if hidden_states is not self.filled.hidden:
            self.filled.hidden.copy_(hidden_states)
        return self.filled

    def is_through(self, call: Any, layer: int) -> bool:
        """Whether the residual stream of a forward call has come through a layer."""
        filled = self.filled
        return filled is not None and filled.filled_for is call and layer <= filled.through

    def decided(self, layer: int, choices: dict[str, Choice]) -> Tensor:
        """Memory of a layer's decisions about the sequences of a batch, ``[targets, B, 1]``, which
        holds these now."""
        keeps = [made.keep for made in choices.values()]
        key = (layer, len(keeps[0]))
        if key not in self.decisions:
            with torch.inference_mode(False):
                self.decisions[key] = {}, keeps[0].new_empty(len(keeps), len(keeps[0]), 1)
        held, memory = self.decisions[key]
        if held is not choices:
            memory.copy_(torch.stack(keeps)[..., None])
            self.decisions[key] = choices, memory
        return memory

    def run(self, key: tuple, function: Callable[[], Any], buffers: Buffers) -> Any:
        """``function()``, whose work is recorded when ``key`` is first met and repeated later; what
        it returns is its own memory, which the next call of the same key overwrites."""
        recorded = buffers.recorded
        if key not in recorded:
            recorded[key] = self._record(function, buffers.keep())
        repeat, result = recorded[key]
        repeat()
        return result

    def _record(
        self, function: Callable[[], Any], restore: Callable[[], Any]
    ) -> tuple[Callable[[], None], Any]:
        """What repeats ``function``, and its result; ``restore`` undoes a call of it."""
        device = next(iter(self.buffers.values())).hidden.device
        with torch.cuda.device(device):  # another one may be the current device
            if self.stream is None:
                self.stream = torch.cuda.Stream()
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                function()  # what libraries make at their first use does not belong into a graph
            here.wait_stream(self.stream)
            restore()
            graph = torch.cuda.CUDAGraph()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                # torch.cuda.graph would empty the cache each time
                graph.capture_begin(pool=self.pool)
                try:
                    result = function()
                finally:
                    graph.capture_end()
            here.wait_stream(self.stream)
        return graph.replay, result
