"""Which implementation of the ops runs: `reference` (plain torch) or `cpu` (C++); GPU kernels come later."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = ("reference", "cpu", "triton", "cuda")

_cpu: Any
try:
    _cpu = importlib.import_module("fastsample._cpu")
    _why_no_cpu = ""
except ImportError as error:
    _cpu = None
    in_source_tree = (Path(__file__).parents[2] / "setup.py").exists()
    _why_no_cpu = (
        f"the source tree has no built extension: run `pip install -e .` once, with a C++ compiler ({error})"
        if in_source_tree
        else f"the package was installed without its C++ extension, for want of a compiler? ({error})"
    )
    warnings.warn(f"fastsample runs on its slow reference backend: {_why_no_cpu}", stacklevel=2)

if _isa := os.environ.get("FASTSAMPLE_CPU_ISA"):
    if _cpu is None:
        raise ValueError(f"FASTSAMPLE_CPU_ISA={_isa!r} asks for CPU kernels: {_why_no_cpu}")
    try:
        _cpu.set_isa(_isa)
    except ValueError as error:
        raise ValueError(f"FASTSAMPLE_CPU_ISA: {error}") from None

_override = os.environ.get("FASTSAMPLE_BACKEND") or None


def backends() -> dict[str, dict[str, Any]]:
    """What can run here, and why the rest cannot.

    Returns:
        For each of "reference", "cpu", "triton" and "cuda" a dict with "available" (bool) and "reason" (empty where
        available). "cpu" also tells "isa", the instruction set in use, "isas", those that this CPU and build have, and
        "threads", the thread runtime.

    Example:
        >>> backends()["reference"]["available"]
        True
    """
    found: dict[str, dict[str, Any]] = {
        "reference": {"available": True, "reason": ""},
        "cpu": {"available": _cpu is not None, "reason": _why_no_cpu},
        "triton": {"available": False, "reason": "this version of fastsample has no Triton kernels"},
        "cuda": {"available": False, "reason": "this version of fastsample has no CUDA kernels"},
    }
    if _cpu is not None:
        found["cpu"].update(isa=_cpu.isa(), isas=_cpu.available_isas(), threads=_cpu.thread_runtime())
    return found


def choose(backend: str | None, device: torch.device, *, native: bool) -> str:
    """The backend for tensors on `device`; `native` says whether compiled kernels can serve the call at all.

    An automatic choice falls back to the reference silently, an explicit one (the argument, else FASTSAMPLE_BACKEND)
    raises ValueError with the reason where it cannot run.
    """
    wanted = backend or _override
    can_run_cpu = native and _cpu is not None and device.type == "cpu"
    if wanted is None:
        return "cpu" if can_run_cpu else "reference"
    if wanted == "reference" or (wanted == "cpu" and can_run_cpu):
        return wanted
    name = "backend" if backend else "FASTSAMPLE_BACKEND"
    if wanted not in _NAMES:
        raise ValueError(f"{name} must be one of {', '.join(_NAMES)}, got {wanted!r}")
    status = backends()[wanted]
    if not status["available"]:
        raise ValueError(f"{name}={wanted!r} cannot run here: {status['reason']}")
    if device.type != "cpu":
        raise ValueError(f"{name}='cpu' cannot run on {device}")
    raise ValueError(f"{name}='cpu' computes in float32 without gradients; use backend='reference'")


def fresh(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, large CPU ones (as NumPy has it, from 4 MiB) in huge pages where the system has them."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if tensor.numel() * tensor.element_size() >= 4 << 20 and tensor.is_cpu and _cpu is not None:
        _cpu.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def mark_written(tensor: Tensor) -> None:
    """Tells autograd, which cannot see kernels write, that the tensor has changed; inference tensors keep no count."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
