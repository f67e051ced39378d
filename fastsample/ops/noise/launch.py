"""Normals on the backend that serves the call; the caller has checked the arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.ops.address import address
from fastsample.ops.backend import choose, cpu_module, cuda_module, place
from fastsample.ops.memory import fresh
from fastsample.ops.noise.reference import randn_reference


def drawn(shape: torch.Size, keys: Tensor, step: int, stream: int, device: torch.device, backend: str | None) -> Tensor:
    """`randn` of these keys in fresh memory."""
    result = fresh(shape, torch.float32, device)
    fill_contiguous(result, keys, step, stream, backend)
    return result


def fill_strided(out: Tensor, keys: Tensor, step: int, stream: int, backend: str | None) -> None:
    """`randn` of these keys into memory of any strides."""
    if out.is_contiguous() and not out.is_neg():
        fill_contiguous(out, keys, step, stream, backend)
    else:
        result = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        fill_contiguous(result, keys, step, stream, backend)
        out.copy_(result)


def fill_contiguous(result: Tensor, keys: Tensor, step: int, stream: int, backend: str | None) -> None:
    """`randn` of these keys into contiguous memory."""
    backend = choose(backend, result.device, native=True)
    keys = keys if keys.device == result.device else keys.to(result.device)
    batch = result.shape[0]
    size = result.numel() // batch
    if backend == "cpu":
        to, of_keys = address("out", result), address("seed", keys)
        cpu_module().randn(to, batch, size, of_keys, step, stream, torch.get_num_threads())
    elif backend == "cuda":
        index, current = place(result.device)
        to, of_keys = address("out", result), address("seed", keys)
        cuda_module().randn(to, batch, size, of_keys, step, stream, current, index)
    elif backend == "triton":
        from fastsample.kernels import noise as kernel

        kernel.randn(result, keys, step, stream)
    else:
        # Apple's GPUs have no float64, in which the reference rounds.
        drawn_on = torch.device("cpu") if result.device.type == "mps" else result.device
        result.copy_(randn_reference(result.shape, keys.to(drawn_on), step, stream))
