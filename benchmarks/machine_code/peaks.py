"""Published limits and peaks of GPUs, from which the static table's occupancies and bounds follow; nothing is measured.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Units and what runs on them:
NVIDIA's forum answers on the pipes of GA100, GA10x and GH100 (forums.developer.nvidia.com/t/302018/7 and /t/108729/4)
and the guide's table of arithmetic throughput. For Blackwell (10.0) the units of Hopper are assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # of a multiprocessor, on all of these
REGISTER_UNIT = 256  # a warp's registers are a multiple of it
RESERVED_SHARED = 1024  # what the system takes of each block's shared memory, from 8.0 on
ISSUED = 4 * WARP  # thread-instructions a clock and multiprocessor: four schedulers, one instruction each


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor of one architecture holds.

    Attributes:
        warps, blocks: at once.
        shared: bytes of shared memory; block_shared: of these for one block.
    """

    warps: int
    blocks: int
    shared: int
    block_shared: int

    def occupancy(self, registers: int, shared: int, warps_a_block: int) -> float:
        """The share of `warps` that can be there at once."""
        registers_a_warp = -(-max(registers, 1) * WARP // REGISTER_UNIT) * REGISTER_UNIT
        # Registers belong to one of four schedulers, with a quarter of them each.
        by_registers = 4 * (REGISTERS // 4 // registers_a_warp) // warps_a_block
        by_shared = self.shared // (shared + RESERVED_SHARED)
        blocks = min(by_registers, by_shared, self.blocks, self.warps // warps_a_block)
        return blocks * warps_a_block / self.warps


LIMITS: Mapping[int, Limits] = {
    75: Limits(32, 16, 64 << 10, 64 << 10),
    80: Limits(64, 32, 164 << 10, 163 << 10),
    86: Limits(48, 16, 100 << 10, 99 << 10),
    89: Limits(48, 24, 100 << 10, 99 << 10),
    90: Limits(64, 32, 228 << 10, 227 << 10),
    100: Limits(64, 32, 228 << 10, 227 << 10),
    120: Limits(48, 24, 100 << 10, 99 << 10),
}
# Of an AMD compute unit (gfx942): 64 KiB of local memory a workgroup, 512 vector registers a lane, 8 waves a SIMD.
GFX942_SHARED, GFX942_REGISTERS, GFX942_WAVES = 64 << 10, 512, 8


@dataclass(frozen=True)
class Gpu:
    """One product.

    Attributes:
        name, arch: such as H100 SXM, 90.
        processors: multiprocessors.
        clock: Hz, boost.
        bandwidth: bytes a second.
        units: thread-instructions a clock and multiprocessor of each unit; "imad" runs on a part of "fma".
    """

    name: str
    arch: int
    processors: int
    clock: float
    bandwidth: float
    units: Mapping[str, int]

    def memory_seconds(self, size: float) -> float:
        """What so many bytes take."""
        return size / self.bandwidth


# fma: 16 lanes a scheduler on GA100, 32 from GA10x on (fmaheavy and fmalite; imad only on the former). alu: 16. xu: 4.
_HOPPER = {"fma": 128, "imad": 64, "alu": 64, "xu": 16, "fp64": 64}
GPUS = (
    # NVIDIA A100 datasheet: 80 GB SXM, 19.5 TFLOPS of FP32, 2039 GB/s. Whitepaper: 108 SMs, boost 1410 MHz.
    Gpu("A100 SXM", 80, 108, 1.41e9, 2.039e12, {"fma": 64, "imad": 64, "alu": 64, "xu": 16, "fp64": 32}),
    # NVIDIA Ada whitepaper: RTX 4090, 128 SMs, boost 2520 MHz, 1008 GB/s.
    Gpu("RTX 4090", 89, 128, 2.52e9, 1.008e12, {"fma": 128, "imad": 64, "alu": 64, "xu": 16, "fp64": 2}),
    # NVIDIA H100 datasheet: SXM, 3.35 TB/s. Whitepaper: 132 SMs; 1830 MHz is the boost behind its tensor peaks (FP32's
    # is 1980; the lower one is the harder test).
    Gpu("H100 SXM", 90, 132, 1.83e9, 3.35e12, _HOPPER),
    # NVIDIA DGX B200 datasheet: 8 TB/s and 2.25 dense PFLOPS of FP16 a GPU; 148 SMs as the driver reports them, which
    # at 8192 such operations a clock makes 1.86 GHz.
    Gpu("B200", 100, 148, 1.86e9, 8.0e12, _HOPPER),
)
