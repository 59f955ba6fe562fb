"""More ranks than GPUs: nccl refuses two on one, so they meet through gloo, which reduces and
gathers tensors of a GPU one by one but does not send them; those go through the host."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

FORCED = "MEGATRON_MOD_SEND_THROUGH_HOST"  # 1: send everything so, to try it on a CPU


class _Work:
    """A send or receive under way, of a copy on the host."""

    def __init__(self, work, host: torch.Tensor, target: torch.Tensor | None) -> None:
        self.work, self.host, self.target = work, host, target

    def wait(self, *args: object) -> bool:
        done = self.work.wait(*args)
        if self.target is not None:
            self.target.detach().copy_(self.host)  # a leaf that wants a gradient
            self.target = None
        return done

    def is_completed(self) -> bool:
        return self.work.is_completed()


def share() -> None:
    """From now on, in this rank; it takes one of the GPUs there are."""
    from megatron_mod.parallel import device

    if device.HAS_GPU:
        os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % torch.cuda.device_count())
    device.collective_backend = lambda: "gloo"
    send, receive = c10d.isend, c10d.irecv

    def stays(tensor: torch.Tensor) -> bool:
        return not tensor.is_cuda and os.environ.get(FORCED) != "1"

    def isend(tensor: torch.Tensor, *args: object, **kwargs: object):
        if stays(tensor):
            return send(tensor, *args, **kwargs)
        host = tensor.detach().to("cpu", copy=True)
        return _Work(send(host, *args, **kwargs), host, None)

    def irecv(tensor: torch.Tensor, *args: object, **kwargs: object):
        if stays(tensor):
            return receive(tensor, *args, **kwargs)
        host = torch.empty_like(tensor, device="cpu")
        return _Work(receive(host, *args, **kwargs), host, tensor)

    for module in (c10d, dist):  # a P2POp asks whether it is one of the two
        module.isend, module.irecv = isend, irecv
    from megatron.core.distributed import param_and_grad_buffer as buffers

    buffers._coalescing_manager = one_by_one


class _Done:
    """Of collectives that were waited for."""

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def one_by_one(group: object = None, *, async_ops: bool = False, **_: object) -> Iterator[_Done]:
    """In the place of torch's manager, which sends collectives of the block off together."""
    assert not async_ops, "collectives that nobody waits for"
    yield _Done()


def is_needed(world: int) -> bool:
    return os.environ.get(FORCED) == "1" or (
        torch.cuda.is_available() and world > torch.cuda.device_count()
    )
