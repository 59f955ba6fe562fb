"""Kinds of GPUs, as their makers' data sheets have them; importing this loads nothing.

Peaks (``parallel/peak.py``) are of dense products that add up in fp32; memory is what the driver
shows, which with error correction is less than the name says; links are bytes a second each way for
one GPU.

| kind | source |
| --- | --- |
| a100-40, a100-80 | NVIDIA A100 Tensor Core GPU data sheet (SXM); DGX A100: 200 Gbit/s a GPU |
| h100, h200 | NVIDIA H100 and H200 Tensor Core GPU data sheets (SXM); DGX H100: 400 Gbit/s a GPU |
| l4 | NVIDIA L4 Tensor Core GPU data sheet, peaks without sparsity |
| a10 | NVIDIA A10 Tensor Core GPU data sheet, peaks without sparsity |
| 3090 | NVIDIA Ampere GA102 GPU Architecture white paper |
| 4090 | NVIDIA Ada GPU Architecture white paper |

The last four sit on PCIe 4.0 x16; between nodes that hold them 100 Gbit/s for eight is assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mod.parallel.peak import PEAKS, TFLOPS

MIB, GB = 2**20, 10**9
FP8 = ("h100", "h200", "l4", "4090")  # by the same sources

# Megatron-LM's README has 41 to 48 % of an H100's peak, communication included; a dense layer of an
# 8B model reached 54 % of an H200's (8,192 tokens, forward: tools/benchmark/RESULTS.md).
EFFICIENCY = 0.5
# Assumed, until measured on several GPUs.
CONTEXT = 0.8 * GB  # CUDA's own, and the matrix library's working space
GROUP = 0.2 * GB  # NCCL's buffers of a process group
SCATTERED = 0.05  # of what comes and goes, between the allocator's blocks


@dataclass(frozen=True)
class Kind:
    """A device that runs one rank.

    Args:
        bfloat16, float32: operations a second.
        memory: bytes.
        bandwidth: of the memory, bytes a second.
        near, far: bytes a second to a device of the same node, and of another.
        efficiency: share of the peak that the products of a training reach.
        fp8: whether it multiplies in FP8, twice as fast as in bfloat16.
        context, group, scattered: what is taken beside tensors: at all, for each process group, and
            as a share of what comes and goes.
    """

    name: str
    bfloat16: float
    float32: float
    memory: int
    bandwidth: float
    near: float
    far: float
    fp8: bool = False
    efficiency: float = EFFICIENCY
    context: float = CONTEXT
    group: float = GROUP
    scattered: float = SCATTERED

    def rate(self, dtype: str, fp8: str | None = None) -> float:
        """Operations a second that a training reaches; with ``fp8``, as if all products were in it
        (of a kind that has it)."""
        peak = self.bfloat16 if dtype == "bfloat16" else self.float32
        return self.efficiency * peak * (1 if fp8 is None else 2)

    def overhead(self, passing: int, *, groups: int) -> int:
        """Bytes beside the tensors, of which ``passing`` come and go."""
        return round(self.context + self.group * groups + self.scattered * passing)


def _kind(name, memory, bandwidth, near, far) -> Kind:
    bfloat16, float32 = PEAKS[name.partition("-")[0]]
    return Kind(
        name,
        bfloat16 * TFLOPS,
        float32 * TFLOPS,
        memory * MIB,
        bandwidth * GB,
        near * GB,
        far * GB,
        fp8=name in FP8,
    )


# name, MiB of memory, GB/s of it, of NVLink or PCIe, between nodes
KINDS = {
    kind.name: kind
    for kind in (
        _kind("a100-40", 40960, 1555, 300, 25),
        _kind("a100-80", 81920, 2039, 300, 25),
        _kind("h100", 81559, 3350, 450, 50),
        _kind("h200", 143771, 4800, 450, 50),
        _kind("l4", 23034, 300, 32, 1.5),
        _kind("a10", 23028, 600, 32, 1.5),
        _kind("3090", 24576, 936, 32, 1.5),
        _kind("4090", 24564, 1008, 32, 1.5),
    )
}
CPU = "cpu"


def require_fp8(fp8: str | None, name: str, has_it: Callable[[], bool]) -> None:
    """Raise ``ValueError`` where a training multiplies in FP8 and the device cannot."""
    if fp8 is not None and not has_it():
        raise ValueError(
            f"model.fp8 = {fp8}: {name} does not multiply in FP8; leave it out, or take one of "
            f"{', '.join(FP8)}."
        )
