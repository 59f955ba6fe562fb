"""CUDA graphs where there are none: operations are recorded, and repeated in the same memory."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NEW = 4
EXACT = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


class Recorder(TorchDispatchMode):
    """What a CUDA graph has of a function: its operations, and the memory of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        returned = [each.alias_info for each in func._schema.returns]
        if not all(alias and not alias.is_write for alias in returned):  # no view
            in_place = all(alias and alias.is_write for alias in returned)
            self.calls.append((func, args, kwargs or {}, None if in_place else made))
        return made

    def replay(self) -> None:
        for func, args, kwargs, kept in self.calls:
            made = func(*args, **kwargs)
            if kept is not None:
                for old, new in zip(tree_leaves(kept), tree_leaves(made), strict=True):
                    old.copy_(new)


def record(self, function, restore):
    """As ``DecodingGraphs._record``."""
    function()
    restore()
    with Recorder() as recorder:
        result = function()
    restore()  # a graph that is recorded has not been run
    return recorder.replay, result


def generated(model, ids, mask=None, **settings):
    output = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True,
        **{**EXACT, **settings},
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits), model.routing_report()


def assert_same(found: list, wanted: list) -> None:
    """Of calls of ``generated``."""
    for ours, (tokens, logits, report) in zip(found, wanted, strict=True):
        assert torch.equal(ours[0], tokens)
        torch.testing.assert_close(ours[1], logits, rtol=1e-4, atol=1e-5)
        assert ours[2] == report
