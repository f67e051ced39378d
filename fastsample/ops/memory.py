"""Memory that ops make and write: fresh tensors, in huge pages where they are large, and what autograd is told."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastsample.ops.backend import cpu_module

HUGE = 4 << 20  # bytes from which memory lies in huge pages, as NumPy has it


def fresh(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor, large CPU ones (as NumPy has it, from 4 MiB) in huge pages where the system has them."""
    return _in_huge_pages(torch.empty(shape, dtype=dtype, device=device))


def fresh_like(tensor: Tensor) -> Tensor:
    """`fresh` of this tensor's shape, dtype and device, in less time."""
    return _in_huge_pages(torch.empty_like(tensor))


def _in_huge_pages(tensor: Tensor) -> Tensor:
    if tensor.nbytes >= HUGE and tensor.is_cpu and (cpu := cpu_module()) is not None:
        cpu.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def ordinary_tensors() -> AbstractContextManager[object]:
    """What is made here is no inference tensor, so that it can be written in any mode."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NOTHING


_NOTHING = nullcontext()


def mark_written(tensor: Tensor) -> None:
    """Tells autograd, which cannot see kernels write, that the tensor has changed; inference tensors keep no count."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
