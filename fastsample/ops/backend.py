"""Which implementation of an op runs: `reference` (plain torch), `cpu` (C++), `triton` or `cuda` (CUDA C++)."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fastsample.checks import no_such_name
from fastsample.ops.tracing import constant_when_traced

Backend = Literal["reference", "cpu", "triton", "cuda"]
_NAMES: tuple[Backend, ...] = get_args(Backend)
_FIRST = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # what an automatic choice tries

_IN_SOURCE_TREE = (Path(__file__).parents[2] / "setup.py").exists()

_cpu: Any
try:
    _cpu = importlib.import_module("fastsample._cpu")
    _why_no_cpu = ""
except ImportError as error:
    _cpu = None
    _why_no_cpu = (
        f"the source tree has no built extension: run `pip install -e .` once, with a C++ compiler ({error})"
        if _IN_SOURCE_TREE
        else f"the package was installed without its C++ extension, for want of a compiler? ({error})"
    )
    warnings.warn(f"fastsample runs on its slow reference backend: {_why_no_cpu}", stacklevel=2)

# Looked up at every use: tests put the same sources in its place, compiled for the CPU.
_cuda: Any
try:
    _cuda = importlib.import_module("fastsample._cuda")
    _why_not_built = ""
except ImportError as error:
    _cuda = None
    _why_not_built = (
        "fastsample was installed without CUDA kernels: no nvcc was found, it failed, or FASTSAMPLE_CUDA was 0; "
        f"FASTSAMPLE_CUDA=1 pip install builds them or tells why not ({error})"
    )

if _isa := os.environ.get("FASTSAMPLE_CPU_ISA"):
    if _cpu is None:
        raise ValueError(f"FASTSAMPLE_CPU_ISA={_isa!r} asks for CPU kernels: {_why_no_cpu}")
    try:
        _cpu.set_isa(_isa)
    except ValueError as error:
        raise ValueError(f"FASTSAMPLE_CPU_ISA: {error}") from None

_override = os.environ.get("FASTSAMPLE_BACKEND") or None


def reasons() -> dict[str, str]:
    """Why each backend cannot run here, empty where it can."""
    return {
        "reference": "",
        "cpu": _why_no_cpu,
        "triton": _why_no_triton(),
        "cuda": _why_no_cuda(_cuda),
    }


@constant_when_traced  # Triton is imported in it and drivers are asked
def choose(
    backend: str | None,
    device: torch.device,
    *,
    native: bool,
    offers: Sequence[str] = ("cpu", "cuda", "triton"),
    op: str = "this op",
    why: str = "computes in float32 without gradients",
) -> str:
    """The backend for tensors on `device`.

    An automatic choice takes `cpu` on a CPU and, on a GPU, `cuda` where it can run, else `triton`, and falls back to
    the reference silently. An explicit one (the argument, else FASTSAMPLE_BACKEND) raises ValueError with the reason
    where it cannot run; FASTSAMPLE_BACKEND leaves ops alone that do not offer what it names.

    Args:
        native: whether compiled kernels can serve the call at all.
        offers: the backends that have kernels for the op, beside the reference.
        op: its name, for messages.
        why: what a message says of compiled kernels that cannot serve the call.
    """
    wanted = _override if backend is None else backend
    if wanted is None:
        return _automatic(device, native, offers)
    if wanted == "reference" or (native and wanted in offers and _runs_on(wanted, device)):
        return wanted
    name = "FASTSAMPLE_BACKEND" if backend is None else "backend"
    if wanted not in _NAMES:
        raise no_such_name(name, wanted, _NAMES)
    if wanted not in offers:
        if backend is None:
            return _automatic(device, native, offers)
        raise ValueError(f"backend={wanted!r} has no kernel for {op}; there are {', '.join(('reference', *offers))}")
    if reason := reasons()[wanted]:
        raise ValueError(f"{name}={wanted!r} cannot run here: {reason}")
    if not _runs_on(wanted, device):
        reason = _why_not_on(device) if wanted == device.type == "cuda" else ""
        raise ValueError(f"{name}={wanted!r} cannot run on {device}{reason and ': '}{reason}")
    raise ValueError(f"{name}={wanted!r} {why}; use backend='reference'")


def _automatic(device: torch.device, native: bool, offers: Sequence[str]) -> str:
    if native:
        for name in _FIRST.get(device.type, ()):
            if name in offers and _runs_on(name, device):
                return name
    return "reference"


def _runs_on(name: str, device: torch.device) -> bool:
    """Whether one of the backends with kernels is there for tensors on `device`."""
    if name == "cpu":
        return device.type == "cpu" and _cpu is not None
    if name == "cuda":
        there = device.type == ("cpu" if _emulated(_cuda) else "cuda") and not _why_no_cuda(_cuda)
        return there and not _why_not_on(device)
    if device.type == "cuda":
        return _triton_imports()
    return device.type == "cpu" and bool(os.environ.get("TRITON_INTERPRET")) and _triton_imports() and interpreted()


@functools.cache
def _why_no_cuda(module: Any) -> str:
    if module is None:
        return _why_not_built
    if _emulated(module):
        return ""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    if reason := module.driver():
        return str(reason)
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


def _why_not_on(device: torch.device) -> str:
    """Why the CUDA kernels that are there cannot run on this GPU: others may be of another architecture."""
    if device.type == "cpu":
        return ""
    return _supports(_cuda, torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _supports(module: Any, index: int) -> str:
    return str(module.supports(index))


def _emulated(module: Any) -> bool:
    """Whether these are the CUDA sources compiled for the CPU, for tests."""
    return getattr(module, "on_cpu", False)


def _why_no_triton() -> str:
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not os.environ.get("TRITON_INTERPRET"):
        # Not imported to find out more: kernels choose the interpreter once, when they are imported.
        return "torch finds no GPU; TRITON_INTERPRET=1 interprets the kernels, slowly"
    try:
        in_interpreter = interpreted()
    except ImportError as error:
        return f"Triton cannot be imported: pip install triton ({error})"
    return "" if has_gpu or in_interpreter else "TRITON_INTERPRET=1 was set after the kernels had been imported"


def _triton_imports() -> bool:
    try:
        interpreted()
    except ImportError:
        return False
    return True


# Compiled code reads what eager code has found out: it can neither import nor use functools' caches.
_found: dict[str, bool] = {}


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter; ImportError where there is no Triton."""
    if "interpreted" not in _found:
        _found["interpreted"] = bool(importlib.import_module("fastsample.kernels.arithmetic").INTERPRETED)
    return _found["interpreted"]


def cpu_module() -> Any:
    """fastsample._cpu."""
    return _cpu


def cuda_module() -> Any:
    """fastsample._cuda as it is now."""
    return _cuda


def place(device: torch.device) -> tuple[int, int]:
    """(index, raw current stream) of a GPU, which kernels of `cuda` are launched on; zeros for a CPU."""
    if device.type == "cpu":
        return 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch._C._cuda_getCurrentRawStream(index)
