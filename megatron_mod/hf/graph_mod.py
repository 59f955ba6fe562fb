"""CUDA graphs of decode steps, and the memory that they share.

``run`` records work when it is first asked for, and repeats it later; all graphs of a batch size
work in the same memory, the residual stream in place. ``step_mod.py`` says what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache_mod import Choice


@dataclass
class Buffers:
    """Memory that graphs of one batch size read and write: the residual stream ``[B, 1, H]``, what
    the attention found ``[B, groups, heads / groups, D]``, cosine and sine of the positions,
    ``[B, 1, 1, D]`` or ``[1, 1, 1, D]`` (the sine's first half negated), and which tokens are no
    padding ``[B, 1]``."""

    hidden: Tensor
    attended: Tensor
    cosine: Tensor
    sine: Tensor
    valid: Tensor
    filled_for: Any = None  # the call that positions and padding are of
    entered: tuple[Hashable, Entered] | None = None  # the next layer's, by ``state``

    def fill(self, call: Any, rotary: Sequence[Tensor]) -> None:
        """Take on positions and padding of a forward call."""
        for own, table in zip((self.cosine, self.sine), rotary, strict=True):
            own.copy_(table.unsqueeze(-2))
        self.sine[..., : self.sine.shape[-1] // 2].neg_()
        valid = call.valid(1)
        self.valid.fill_(True) if valid is None else self.valid.copy_(valid)
        self.filled_for, self.entered = call, None

    def state(self, layer: int) -> Hashable:
        """Another one whenever something but a graph has changed the layer's input."""
        return layer, self.hidden._version

    def rotate(self, heads: Tensor) -> Tensor:
        """Queries or keys ``[B, 1, heads, D]``, by their positions."""
        return torch.addcmul(heads * self.cosine, heads.roll(heads.shape[-1] // 2, -1), self.sine)


@dataclass
class Entered:
    """What precedes a layer's attention: queries ``[B, groups, heads / groups, D]``, keys and
    values ``[B, groups, 1, D]`` (None: it has no use for them), the decisions of its routers of
    tokens ``[targets, B, 1]`` bool, and what exact ones multiply by, of each target ``[B, 1, 1]``.
    """

    projected: list[Tensor] | None = None
    decided: Tensor | None = None
    factors: dict[str, Tensor] = field(default_factory=dict)


class DecodingGraphs:
    """The graphs of a model's layers, and the memory that they share."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.steps: dict[int, Any] = {}  # of each layer, its ``DecodeStep``
        self.buffers: dict[Hashable, Buffers] = {}
        self.filled: Buffers | None = None  # those of the latest forward call
        self.recorded: dict[Hashable, tuple[Callable[[], None], Any]] = {}
        self.decisions: dict[Hashable, tuple[dict[str, Choice], Tensor]] = {}
        self.pool: Any = None
        self.answer: tuple[Tensor, Any] | None = None  # memory of the host, and when it is filled

    @staticmethod
    def work_on(device: torch.device) -> bool:
        """Whether there are graphs on a device."""
        return device.type == "cuda"

    def enter(
        self, call: Any, hidden_states: Tensor, rotary: Sequence[Tensor], heads: Sequence[int]
    ) -> Buffers:
        """The buffers of a batch, which hold a layer's input ``[B, 1, H]`` now; ``call``: the
        forward call's ``RoutingCall``; ``heads``: groups, heads of each, and their channels."""
        if self.filled is None or self.filled.filled_for is not call:
            self.filled = self._filled(call, hidden_states, rotary, heads)
        if hidden_states is not self.filled.hidden:
            self.filled.hidden.copy_(hidden_states)
        return self.filled

    def _filled(
        self, call: Any, hidden_states: Tensor, rotary: Sequence[Tensor], heads: Sequence[int]
    ) -> Buffers:
        key = (*hidden_states.shape, *rotary[0].shape, hidden_states.dtype)
        if key not in self.buffers:
            with torch.inference_mode(False):
                cosine, sine = (t.new_empty(t.unsqueeze(-2).shape) for t in rotary)
                self.buffers[key] = Buffers(
                    torch.empty_like(hidden_states, requires_grad=False),
                    hidden_states.new_zeros(len(hidden_states), *heads),
                    cosine,
                    sine,
                    cosine.new_ones(hidden_states.shape[:2], dtype=torch.bool),
                )
        self.buffers[key].fill(call, rotary)
        return self.buffers[key]

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

    def ask(self, decided: Tensor) -> Callable[[], Tensor]:
        """What waits for a layer's decisions ``[targets, 1, 1]`` and returns them on the host; what
        is launched before it is called does not delay them."""
        if decided.device.type == "cpu":
            return decided.clone
        if self.answer is None or self.answer[0].shape != decided.shape:
            with torch.inference_mode(False):
                memory = torch.empty_like(decided, device="cpu", pin_memory=True)
            self.answer = memory, torch.cuda.Event()
        memory, filled = self.answer
        memory.copy_(decided, non_blocking=True)
        filled.record(torch.cuda.current_stream(decided.device))

        def answer() -> Tensor:
            filled.synchronize()
            return memory.clone()  # the next layer's overwrite it

        return answer

    def run(self, key: tuple, function: Callable[[], Any], buffers: Buffers) -> Any:
        """``function()``, whose work is recorded when ``key`` is first met and repeated later; what
        it returns is its own memory, which the next call of the same key overwrites."""
        key = (*key, id(buffers))
        if key not in self.recorded:
            before = buffers.hidden.clone()
            self.recorded[key] = self._record(function, lambda: buffers.hidden.copy_(before))
        repeat, result = self.recorded[key]
        repeat()
        return result

    def _record(
        self, function: Callable[[], Any], restore: Callable[[], Any]
    ) -> tuple[Callable[[], None], Any]:
        """What repeats ``function``, and its result; ``restore`` undoes a call of it."""
        device = next(iter(self.buffers.values())).hidden.device
        with torch.cuda.device(device):  # another one may be the current device
            if self.pool is None:
                self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
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
