"""The CUDA kernels of noise and copy, run on the CPU, against the CPU kernels bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastsample import ops
from fastsample.ops.backend import cpu_module
from support.cuda_on_cpu import calls
from support.cuda_on_cpu.build import ORDERS, CudaOnCpu
from support.cuda_on_cpu.calls import Memory
from support.splitmix import key, signed

_cpu = cpu_module()

pytest_plugins = ["support.cuda_on_cpu.fixtures"]

SIZES = [1, 3, 4, 5, 7, 8, 9, 112, 1023, 1024, 4100]
SEEDS = [7, 2**64 - 1, 2**40 + 1]
KEY = 2**40 + 1  # in both words


@pytest.mark.usefixtures("scalar")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_same_bits_as_the_cpu(on_cpu: CudaOnCpu, memory: Memory, size: int, batch: int) -> None:
    seeds = SEEDS[-batch:]
    for shift in (0, 1, 2, 3):
        for step, stream in ((0, 0), (2**32 - 1, 1), (5, 2**32 - 1)):
            want = ops.randn((batch, size), seed=seeds, step=step, stream=stream, backend="cpu")
            got = calls.randn(on_cpu.module, memory.output((batch, size), shift=shift), seeds, step, stream)
            assert calls.same_bits(got, want), (shift, step, stream)


@pytest.mark.parametrize("order", ORDERS)
def test_many_samples_need_more_than_one_block_and_any_order_will_do(
    on_cpu: CudaOnCpu, memory: Memory, order: str
) -> None:
    want = ops.randn((300, 7), seed=11, backend="cpu")
    with on_cpu.order(order):
        got = calls.randn(on_cpu.module, memory.output((300, 7)), 11, 0, 0)
    assert calls.same_bits(got, want)


def test_aligned_memory_takes_the_wide_kernel(on_cpu: CudaOnCpu, memory: Memory) -> None:
    taken = {}
    for size, shift in ((1024, 0), (1024, 1), (1023, 0)):
        on_cpu.launches()
        calls.randn(on_cpu.module, memory.output((2, size), shift=shift), 1, 0, 0)
        taken[size, shift] = [launch.kernel for launch in on_cpu.launches()]
    assert taken[1024, 1] == taken[1023, 0] != taken[1024, 0]


# More than 2^31 elements: the address of the first one is made up, and only blocks whose elements exist run.

BEYOND_INT32 = 2**31
BEYOND_UINT32_GROUPS = 4 * 2**32  # group i / 4 no longer fits one word of the counter


@pytest.mark.usefixtures("scalar")
@pytest.mark.parametrize(
    ("size", "near"),
    [
        (BEYOND_INT32 + 4096, BEYOND_INT32),
        (BEYOND_INT32 + 4096, BEYOND_INT32 // 2),  # 2^32 bytes
        (BEYOND_INT32 + 4099, BEYOND_INT32 + 4098),
        (BEYOND_UINT32_GROUPS + 4096, BEYOND_UINT32_GROUPS),
        (BEYOND_UINT32_GROUPS + 4099, BEYOND_UINT32_GROUPS),
    ],
    ids=["2^31", "2^30", "end", "2^34", "2^34-odd"],
)
def test_one_sample_of_more_than_2_31_elements(on_cpu: CudaOnCpu, memory: Memory, size: int, near: int) -> None:
    keys = torch.tensor([KEY])

    def draw(address: int) -> None:
        on_cpu.module.randn(address, 1, size, keys.data_ptr(), 3, 1, 0, 0)

    per_block = elements_per_block(on_cpu, lambda: draw(0), size)
    first_block, last_block = near // per_block - 1, min(near // per_block + 1, (size - 1) // per_block)
    first, last = first_block * per_block, min((last_block + 1) * per_block, size)
    got = memory.output((last - first,))
    with on_cpu.window(first_block, last_block):
        draw(got.data_ptr() - 4 * first)
    want = torch.empty(last - first)
    _cpu.normals(want.data_ptr(), first, last - first, KEY, 3, 1)
    assert calls.same_bits(got, want)


@pytest.mark.usefixtures("scalar")
@pytest.mark.parametrize("size", [1, 7, 1024, 1536])
def test_samples_of_more_than_2_31_elements_in_all(on_cpu: CudaOnCpu, memory: Memory, size: int) -> None:
    batch = BEYOND_INT32 // size + 9
    keys = signed(key(100, place) for place in range(200))

    def draw(address: int, key_address: int) -> None:
        on_cpu.module.randn(address, batch, size, key_address, 3, 1, 0, 0)

    on_cpu.launches()
    with on_cpu.window(2**63, 2**63):
        draw(0, 0)
    (launch,) = on_cpu.launches()
    # A block takes as many samples as it is high; the last ones take the last blocks.
    across, high = launch.grid[0], launch.block[1]
    first_sample = (batch - 40) // high * high
    count = batch - first_sample
    got = memory.output((count, size))
    with on_cpu.window(first_sample // high * across, (batch + high - 1) // high * across - 1):
        draw(got.data_ptr() - 4 * first_sample * size, keys.data_ptr() - 8 * first_sample)
    want = ops.randn((count, size), seed=100, step=3, stream=1, backend="cpu")
    assert calls.same_bits(got, want)


def elements_per_block(on_cpu: CudaOnCpu, launch_all: Callable[[], None], size: int) -> int:
    """How many elements of one sample a block takes, from the grid of a launch none of whose blocks runs."""
    on_cpu.launches()
    with on_cpu.window(2**63, 2**63):
        launch_all()
    (launch,) = on_cpu.launches()
    threads = launch.block[0]
    assert launch.block[1] == 1 and launch.grid[1:] == (1, 1)
    (per_thread,) = (n for n in (1, 2, 4, 8, 16) if -(-size // (threads * n)) == launch.grid[0])
    return threads * per_thread


@pytest.mark.parametrize("count", [1, 16, 31, 32, 48, 4096, 65_552, 4099])
def test_copy(on_cpu: CudaOnCpu, count: int) -> None:
    given = torch.arange(count).to(torch.uint8)
    out = torch.full((count + 64,), 0x5A, dtype=torch.uint8)
    on_cpu.module.copy(out.data_ptr(), given.data_ptr(), count, 0, 0)
    assert torch.equal(out[:count], given) and bool((out[count:] == 0x5A).all())
