"""The instruction sets of the CPU kernels: which there are here, and how a test chooses one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fastsample.ops import backend as backends
from fastsample.ops.backend import cpu_module
from support.amx_on_cpu import build as amx_build

_cpu = cpu_module()

LEVELS = _cpu.available_isas() if _cpu is not None else []
AMX_ON_CPU = "amx-on-cpu"
_MODELLED = pytest.mark.ahead(amx_build.undefined)
LORA_LEVELS = [*LEVELS, pytest.param(AMX_ON_CPU, marks=_MODELLED)]
BACKENDS = ["reference", *(f"cpu-{level}" for level in LEVELS)]
LORA_BACKENDS = [*BACKENDS, pytest.param(f"cpu-{AMX_ON_CPU}", marks=_MODELLED)]

needs_cpu = pytest.mark.skipif(_cpu is None, reason="the C++ extension is not built")


@contextmanager
def at_level(isa: str) -> Iterator[None]:
    """The CPU kernels at this level; at AMX_ON_CPU those of lora_linear for AMX, over a model of its instructions."""
    if isa == AMX_ON_CPU and (reason := amx_build.why_not()):
        pytest.skip(reason)
    before = _cpu.isa()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_cpu", amx_build.amx_on_cpu() if isa == AMX_ON_CPU else _cpu)
        try:
            if isa != AMX_ON_CPU:
                _cpu.set_isa(isa)
            yield
        finally:
            _cpu.set_isa(before)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """torch, and with it the CPU kernels, on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
