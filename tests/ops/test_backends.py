"""Which backend serves a call, and why others cannot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import fastsample
from fastsample.ops import backend as hub

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def built(driver: str = "", supports: str = "") -> ModuleType:
    """fastsample._cuda as nvcc would have made it; `supports` is what keeps it from GPU 0."""
    module = ModuleType("_cuda")
    module.__dict__.update(driver=lambda: driver, architectures=lambda: ["80", "90"])
    module.__dict__["supports"] = lambda index: supports if index == 0 else ""
    return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a GPU, CUDA kernels and Triton, as far as choosing goes."""
    monkeypatch.setattr(hub, "_cuda", built())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hub, "interpreted", lambda: False)
    monkeypatch.setattr(hub, "_override", None)
    hub._why_no_cuda.cache_clear()
    yield
    hub._why_no_cuda.cache_clear()  # what modules have told here is true of no other machine


def no_triton() -> bool:
    raise ImportError("No module named 'triton'")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("device", "native", "offers", "lacks", "want"),
    [
        pytest.param(GPU, True, ("cpu", "cuda", "triton"), [], "cuda", id="cuda-first"),
        pytest.param(GPU, True, ("cpu", "triton"), [], "triton", id="no-cuda-kernel"),
        pytest.param(GPU, True, ("cpu", "cuda", "triton"), ["cuda"], "triton", id="cuda-not-built"),
        pytest.param(GPU, True, ("cpu", "cuda", "triton"), ["cuda", "triton"], "reference", id="nothing-built"),
        pytest.param(GPU, True, ("cpu", "cuda"), ["cuda"], "reference", id="no-triton-kernel"),
        pytest.param(GPU, False, ("cpu", "cuda", "triton"), [], "reference", id="gradients-on-a-gpu"),
        pytest.param(CPU, True, ("cpu", "cuda", "triton"), [], "cpu", id="cpu"),
        pytest.param(CPU, True, ("triton",), [], "reference", id="no-cpu-kernel"),
        pytest.param(CPU, False, ("cpu", "cuda", "triton"), [], "reference", id="gradients"),
        pytest.param(torch.device("mps"), True, ("cpu", "cuda", "triton"), [], "reference", id="another-device"),
    ],
)
def test_automatic_choice(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    native: bool,
    offers: tuple[str, ...],
    lacks: list[str],
    want: str,
) -> None:
    if want == "cpu" and hub._cpu is None:
        pytest.skip("the C++ extension is not built")
    if "cuda" in lacks:
        monkeypatch.setattr(hub, "_cuda", built("no driver"))
    if "triton" in lacks:
        monkeypatch.setattr(hub, "interpreted", no_triton)
    assert hub.choose(None, device, native=native, offers=offers) == want


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("name", "device", "native", "offers", "message"),
    [
        pytest.param(
            "cuda", GPU, True, ("cpu", "triton"), "no kernel for tests; there are reference, cpu, triton", id="op"
        ),
        pytest.param("cpu", GPU, True, ("triton",), "'cpu' has no kernel for tests", id="op-without-cpu"),
        pytest.param("cuda", CPU, True, ("cuda",), "'cuda' cannot run on cpu", id="cuda-on-cpu"),
        pytest.param("triton", CPU, True, ("triton",), "'triton' cannot run on cpu", id="triton-on-cpu"),
        pytest.param("cuda", GPU, False, ("cuda",), "in float32 without gradients", id="gradients"),
        pytest.param("Cuda", GPU, True, ("cuda",), "one of reference, cpu, triton, cuda, got 'Cuda'", id="unknown"),
    ],
)
def test_an_explicit_backend_that_cannot_run_says_why(
    name: str, device: torch.device, native: bool, offers: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hub.choose(name, device, native=native, offers=offers, op="tests")


@pytest.mark.usefixtures("gpu")
def test_a_gpu_of_an_architecture_that_was_not_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_cuda", built(supports="a GPU of compute capability 7.0 cannot run them"))
    assert hub.choose(None, GPU, native=True) == "triton"
    with pytest.raises(ValueError, match="'cuda' cannot run on cuda:0: a GPU of compute capability 7"):
        hub.choose("cuda", GPU, native=True)
    other = torch.device("cuda:1")
    assert hub.choose(None, other, native=True) == hub.choose("cuda", other, native=True) == "cuda"
    assert fastsample.backends()["cuda"]["available"], "on the other one"


@pytest.mark.usefixtures("gpu")
def test_the_environment_leaves_ops_alone_that_lack_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_override", "cuda")
    assert hub.choose(None, GPU, native=True) == "cuda"
    assert hub.choose(None, GPU, native=True, offers=("cpu", "triton")) == "triton"
    assert hub.choose(None, CPU, native=True, offers=("triton",)) == "reference"
    assert hub.choose("triton", GPU, native=True) == "triton", "the argument beats the environment"
    with pytest.raises(ValueError, match="FASTSAMPLE_BACKEND='cuda' cannot run on cpu"):
        hub.choose(None, CPU, native=True)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param((hub, "_cuda", None), "install without nvcc", id="not-built"),
        pytest.param((hub, "_cuda", built("CUDA driver version is insufficient")), "insufficient", id="driver"),
        pytest.param((torch.version, "cuda", None), "has no CUDA", id="torch-without-cuda"),
        pytest.param((torch.cuda, "is_available", lambda: False), "torch finds no CUDA device", id="no-device"),
    ],
)
def test_why_cuda_cannot_run(monkeypatch: pytest.MonkeyPatch, change: tuple[Any, str, Any], reason: str) -> None:
    assert fastsample.backends()["cuda"] == {"available": True, "reason": "", "architectures": ["80", "90"]}
    monkeypatch.setattr(hub, "_cuda", built())  # a module is asked once
    monkeypatch.setattr(hub, "_why_not_built", "install without nvcc")
    monkeypatch.setattr(*change)
    hub._why_no_cuda.cache_clear()
    found = fastsample.backends()["cuda"]
    assert not found["available"] and reason in found["reason"]
    with pytest.raises(ValueError, match=f"backend='cuda' cannot run here: .*{reason}"):
        hub.choose("cuda", GPU, native=True)


@pytest.mark.usefixtures("gpu")
def test_why_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastsample.backends()["triton"] == {"available": True, "reason": "", "interpreted": False}
    monkeypatch.setattr(hub, "interpreted", no_triton)
    assert "pip install triton" in fastsample.backends()["triton"]["reason"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1 interprets" in fastsample.backends()["triton"]["reason"]
    monkeypatch.setattr(hub, "interpreted", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "set after" in fastsample.backends()["triton"]["reason"]


def test_importing_starts_nothing() -> None:
    code = """
import sys, torch, fastsample
print([name for name in ("triton", "torch._dynamo") if name in sys.modules], torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[] False", done.stderr


# One result from all of them.
