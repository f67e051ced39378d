"""What the tests of the CUDA kernels share: `pytest_plugins = ["support.cuda_on_cpu.fixtures"]`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastsample.ops.backend import cpu_module
from support.cuda_on_cpu.build import CudaOnCpu, cuda_on_cpu, why_not
from support.cuda_on_cpu.calls import Memory
from support.levels import at_level

_cpu = cpu_module()


@pytest.fixture
def on_cpu() -> CudaOnCpu:
    """The CUDA sources as C++."""
    if reason := why_not():
        pytest.skip(reason)
    return cuda_on_cpu()


@pytest.fixture
def scalar() -> Iterator[None]:
    """The CPU kernels at the level whose arithmetic CUDA's is compared with."""
    if _cpu is None:
        pytest.skip("the C++ extension is not built")
    with at_level("scalar"):
        yield


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Memory whose margins are looked at when the test is over."""
    memory = Memory()
    yield memory
    memory.check()
