"""Noise as torch.compile, exports and recorders see it: registered ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsample.ops.noise.launch import drawn, fill_strided
from fastsample.ops.tracing import outside


@torch.library.custom_op("fastsample::randn", mutates_args=())
def _randn(
    keys: Tensor, shape: Sequence[int], step: int, stream: int, device: torch.device, backend: str | None
) -> Tensor:
    return drawn(torch.Size((len(keys), *shape)), keys, step, stream, device, backend)


@_randn.register_fake
def _shape(keys: Tensor, shape: Sequence[int], step: int, stream: int, device: torch.device, *_: object) -> Tensor:
    return keys.new_empty((keys.shape[0], *shape), dtype=torch.float32, device=device)


@torch.library.custom_op("fastsample::randn_out", mutates_args=("out",))
def _randn_out(out: Tensor, keys: Tensor, step: int, stream: int, backend: str | None) -> None:
    fill_strided(out, keys, step, stream, backend)


def traced_normals(
    shape: torch.Size, keys: Tensor, step: int, stream: int, device: torch.device, backend: str | None
) -> Tensor:
    """`drawn` through a registered op."""
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace takes the noise as a constant
        with outside():
            return drawn(torch.Size([int(size) for size in shape]), keys, step, stream, device, backend)
    normals: Tensor = torch.ops.fastsample.randn(keys, shape[1:], step, stream, device, backend)
    return normals


def traced_fill(out: Tensor, keys: Tensor, step: int, stream: int, backend: str | None) -> Tensor:
    """`fill_strided` through a registered op; returns `out`."""
    torch.ops.fastsample.randn_out(out, keys, step, stream, backend)
    return out
