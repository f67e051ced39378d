"""What every test shares."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

# First of all: whether Triton interprets is settled when its kernels are imported.
from support.devices import DEVICE, HAS_GPU, Target  # isort: split

import fastsample
from fastsample.ops import backend as backends
from support import ahead
from support.amx_on_cpu import build as amx_build
from support.levels import BACKENDS, LORA_BACKENDS, at_level, on_threads
from support.nan_memory import fill_with_nan
from support.peers import beside_the_lock


def pytest_report_header() -> str:
    """Whoever sees a failure sees whether other packages than the lock's made it."""
    return beside_the_lock()


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


@pytest.fixture(autouse=True)
def nan_filled_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's functions; tensors' own `new_empty` follows where a test asks for `nan_filled_new_empty`."""
    # torch looks up once what follows its default device: not what stands here instead.
    _device_constructors()
    fill_with_nan(monkeypatch, torch, "empty", "empty_like")


@pytest.fixture
def nan_filled_new_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights and factors start as NaN, the padding of panels and of ranks too."""
    fill_with_nan(monkeypatch, Tensor, "new_empty")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--amx-on-cpu", action="store_true", help="every lora_linear runs the kernels for AMX on a model of it"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--amx-on-cpu"):
        backends._cpu = amx_build.amx_on_cpu()


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "backend" in metafunc.fixturenames and "backend" not in own:
        has_amx = metafunc.definition.get_closest_marker("amx_on_cpu")
        metafunc.parametrize("backend", LORA_BACKENDS if has_amx else BACKENDS, indirect=True)


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """A CPU instruction set, forced for one test: @pytest.mark.parametrize("level", LEVELS, indirect=True)."""
    with at_level(request.param):
        yield request.param


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend, the CPU kernels once per instruction set; where marked `amx_on_cpu` for AMX over its model too."""
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


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def any_backend(request: pytest.FixtureRequest) -> Target:
    """Every backend: without a GPU Triton's are interpreted, CUDA's compiled for the CPU. For few, small cases."""
    name = request.param
    if name == "cuda" and not (HAS_GPU and fastsample.backends()["cuda"]["available"]):
        request.getfixturevalue("cuda_on_cpu")
    elif reason := fastsample.backends()[name]["reason"]:
        pytest.skip(reason)
    return Target(name, "cuda" if HAS_GPU and name in ("triton", "cuda") and not _on_cpu() else "cpu")


def _on_cpu() -> bool:
    return getattr(backends._cuda, "on_cpu", False)


@pytest.fixture
def device() -> str:
    """The GPU where there is one, else the CPU."""
    return DEVICE.type


@pytest.fixture
def one_thread() -> Iterator[None]:
    with on_threads(1):
        yield


@pytest.fixture
def one_thread_and_seed(one_thread: None) -> None:
    """Threads that share busy cores wait for one another longer than small networks run."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing that was compiled before, and nothing left to later tests."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def compiler(fresh_compiler: None) -> Any:
    """A backend that counts what it compiles, from an empty cache."""
    # Its import takes seconds.
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend("eager")
