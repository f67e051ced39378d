"""What every test shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample.ops.backend import _cpu

GOLDEN = Path(__file__).parent / "golden"
LEVELS = _cpu.available_isas() if _cpu is not None else []


@pytest.fixture(autouse=True)
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors start as NaN, so that an output that is not written does not pass by luck."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """A CPU instruction set, forced for one test: @pytest.mark.parametrize("level", LEVELS, indirect=True)."""
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


@pytest.fixture(params=["reference", *(f"cpu-{name}" for name in LEVELS)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend, the CPU kernels once per instruction set."""
    name, _, isa = request.param.partition("-")
    before = _cpu.isa() if isa else ""
    if isa:
        _cpu.set_isa(isa)
    yield name
    if isa:
        _cpu.set_isa(before)


@pytest.fixture
def one_thread_and_seed() -> Iterator[None]:
    """Threads that share busy cores wait for one another longer than small networks run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compiler() -> Iterator[Any]:
    """A backend that counts what it compiles, from an empty cache."""
    # Its import takes seconds.
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    yield CompileCounterWithBackend("eager")
    torch.compiler.reset()


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return dict(data)
