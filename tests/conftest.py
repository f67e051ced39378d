"""What every test shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from support.paths import GOLDEN
from support.peers import lock, outside

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads it when kernels are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastsample.ops import backend as backends  # noqa: E402
from fastsample.ops.backend import _cpu  # noqa: E402
from support import ahead  # noqa: E402
from support.amx_on_cpu import build as amx_build  # noqa: E402


def pytest_report_header() -> str:
    """Whoever sees a failure sees whether other packages than the lock's made it."""
    return f"beside constraints.txt: {', '.join(outside(lock())) or 'nothing'}"


def pytest_collection_finish(session: pytest.Session) -> None:
    # What is imported by now stays; every collection of garbage would look at its million objects.
    gc.collect()
    gc.freeze()
    if not session.config.option.collectonly:
        for item in session.items:
            for mark in item.iter_markers("ahead"):
                for job in mark.args:
                    job.begin()


def pytest_sessionfinish() -> None:
    ahead.stop()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not HAS_GPU:
        pytest.skip("torch finds no GPU")


LEVELS = _cpu.available_isas() if _cpu is not None else []


@pytest.fixture(autouse=True)
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors start as NaN, so that an output that is not written does not pass by luck."""
    # torch looks up once what follows its default device: not what stands here instead.
    _device_constructors()
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


AMX_ON_CPU = "amx-on-cpu"
_MODELLED = pytest.mark.ahead(amx_build.undefined)
LORA_LEVELS = [*LEVELS, pytest.param(AMX_ON_CPU, marks=_MODELLED)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--amx-on-cpu", action="store_true", help="every lora_linear runs the kernels for AMX on a model of it"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--amx-on-cpu"):
        backends._cpu = amx_build.amx_on_cpu()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "backend" in metafunc.fixturenames and "backend" not in own:
        every: list[Any] = ["reference", *(f"cpu-{name}" for name in LEVELS)]
        if metafunc.module.__name__.startswith("test_lora"):
            every.append(pytest.param(f"cpu-{AMX_ON_CPU}", marks=_MODELLED))
        metafunc.parametrize("backend", every, indirect=True)


@contextmanager
def at_level(isa: str) -> Iterator[None]:
    """The CPU kernels at this level; at AMX_ON_CPU those of lora_linear for AMX, over a model of its instructions."""
    if isa == AMX_ON_CPU and (reason := amx_build.why_not()):
        pytest.skip(reason)
    before = _cpu.isa()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_cpu", amx_build.amx_on_cpu() if isa == AMX_ON_CPU else _cpu)
        if isa != AMX_ON_CPU:
            _cpu.set_isa(isa)
        yield
    _cpu.set_isa(before)


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """A CPU instruction set, forced for one test: @pytest.mark.parametrize("level", LEVELS, indirect=True)."""
    with at_level(request.param):
        yield request.param


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend, the CPU kernels once per instruction set and, in the tests of LoRA, for AMX over its model."""
    name, _, isa = request.param.partition("-")
    with at_level(isa) if isa else nullcontext():
        yield name


@pytest.fixture
def cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="cuda" on CPU tensors: the CUDA sources compiled as C++ in place of what nvcc makes of them."""
    from support.cuda_on_cpu import build

    if reason := build.why_not():
        pytest.skip(reason)
    module = build.cuda_on_cpu().module
    monkeypatch.setattr(module, "on_cpu", True, raising=False)
    monkeypatch.setattr(backends, "_cuda", module)


class Floor(NamedTuple):
    """A backend, and the device whose tensors it takes here."""

    backend: str
    device: str


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def any_backend(request: pytest.FixtureRequest) -> Floor:
    """Every backend: without a GPU Triton's are interpreted, CUDA's compiled for the CPU. For few, small cases."""
    name = request.param
    if name == "cuda" and not (HAS_GPU and backends.backends()["cuda"]["available"]):
        request.getfixturevalue("cuda_on_cpu")
    elif reason := backends.backends()[name]["reason"]:
        pytest.skip(reason)
    return Floor(name, "cuda" if HAS_GPU and name in ("triton", "cuda") and not _on_cpu() else "cpu")


def _on_cpu() -> bool:
    return getattr(backends._cuda, "on_cpu", False)


@pytest.fixture
def device() -> str:
    """The GPU where there is one, else the CPU."""
    return "cuda" if HAS_GPU else "cpu"


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
