"""What a training step holds in memory, seen tensor by tensor."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """The most bytes that exist at a time of all that operations in the block have made."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.known and storage not in given:
                    self.known.add(storage)
                    self._change(storage.nbytes())
                    weakref.finalize(storage, self._change, -storage.nbytes())
        return made

    def _change(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


@contextlib.contextmanager
def kept_by_layer(layers: torch.nn.ModuleList) -> Iterator[Counter]:
    """Bytes of what autograd saves in the forward pass of each layer, parameters left out, each
    storage counted where it is first saved."""
    own = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    kept: Counter = Counter()
    seen: dict[int, torch.Tensor] = {}  # which keeps their places from being used again
    here: list[int] = []
    hooks = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if here and place not in own and place not in seen:
            seen[place] = tensor
            kept[here[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    for index, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(lambda *_, index=index: here.append(index)))
        hooks.append(layer.register_forward_hook(lambda *_: here.clear()))
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()
