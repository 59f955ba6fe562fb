"""Which of torch's attention kernels are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import cuda

# Of all tokens: with fewer queries a mask is quicker on a GPU, with more queries at their places
# among all, zeros elsewhere (measured on an H200).
MASKED = 0.3


@contextmanager
def kernels_of_any_shape() -> Iterator[None]:
    """Leaves out cuDNN's attention, which plans anew for each shape that it meets (on an H200 35 ms
    of the host's time): numbers of tokens that routers choose, or that grow by one at each step,
    are new every time."""
    before = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(before)
