"""Calls of the CUDA kernels' bindings on CPU tensors, and memory that shows what they touched."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastsample import Table
from fastsample.ops.noise.keys import Seed, sample_keys

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NEITHER_BOX_NOR_DENSITY = {"low": 0, "high": 0, "log_prob_sums": 0}
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
_MARGIN, _CANARY = 64, 0x5A  # bytes on either side of an output


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def randn(cuda: ModuleType, out: Tensor, seed: Seed, step: int, stream: int) -> Tensor:
    batch = len(out)
    keys = sample_keys(seed, 0, batch, out.device)
    cuda.randn(out.data_ptr(), batch, out.numel() // batch, keys.data_ptr(), step, stream, 0, 0)
    return out


def step(
    cuda: ModuleType,
    x: Tensor,
    model_output: Tensor,
    table: Table,
    row: int | Tensor,
    *,
    out: Tensor,
    noise: Tensor | None = None,
    seed: int | Sequence[int] | None = None,
    guidance: float | Sequence[float] | None = None,
    guidance_rescale: float = 0.0,
    history: Sequence[Tensor] = (),
    x0_out: Tensor | None = None,
    input_out: Tensor | None = None,
) -> Tensor:
    """fastsample.ops.step by the CUDA kernel, into `out`; everything contiguous, rows unchecked."""
    batch, size = len(x), x.numel() // len(x)
    guided = guidance is not None
    m_stride = model_output.numel() // (2 * batch if guided else batch)
    weights = _weights(guidance, batch)
    keys = None if seed is None else sample_keys(seed, 0, batch, x.device)
    h1, h2, h3 = (*history, None, None, None)[:3]
    rows = row if isinstance(row, Tensor) else None
    # 16-byte aligned, as torch's own allocations on a device are.
    bytes_needed = cuda.step_workspace(batch, size, guidance_rescale != 0, table.thresholded)
    workspace = torch.full(((bytes_needed + 3) // 4,), float("nan"))
    kernel = cuda.Step(
        rows=table.packed_address,
        row_count=len(table),
        row_of=address(rows),
        batch=batch,
        size=size,
        x=address(x),
        keys=address(keys),
        guidance=address(weights),
        rescale=guidance_rescale,
        thresholds=table.thresholded,
        h1=address(h1),
        h2=address(h2),
        h3=address(h3),
        x0_out=address(x0_out),
        input_out=address(input_out),
        second_input_out=address(_second_half(input_out, batch)),
        input_dtype=0 if input_out is None else CODES[input_out.dtype],
        **NEITHER_BOX_NOR_DENSITY,
        workspace=address(workspace) if bytes_needed else 0,
        device=0,
    )
    kernel(
        *(row if isinstance(row, int) else 0, address(model_output), m_stride, CODES[model_output.dtype], guided),
        *(address(noise), address(out), x0_out is not None, input_out is not None, 0),
    )
    return out


def _weights(guidance: float | Sequence[float] | None, batch: int) -> Tensor | None:
    if guidance is None:
        return None
    return torch.tensor(guidance if isinstance(guidance, Sequence) else [guidance] * batch, dtype=torch.float32)


def _second_half(model_input: Tensor | None, batch: int) -> Tensor | None:
    """Of an input that is written for both halves of a guided model."""
    return model_input[batch:] if model_input is not None and len(model_input) == 2 * batch else None


def posterior(
    cuda: ModuleType,
    x: Tensor,
    model_output: Tensor,
    table: Table,
    row: int | Tensor,
    constant: Tensor,
    slope: Tensor,
    mean: Tensor,
    log_variance: Tensor | None,
) -> None:
    batch, size = len(x), x.numel() // len(x)
    cuda.posterior(
        table.packed_address,
        len(table),
        address(row) if isinstance(row, Tensor) else 0,
        row if isinstance(row, int) else 0,
        batch,
        size,
        address(x),
        address(model_output),
        model_output.numel() // batch,
        CODES[model_output.dtype],
        address(constant),
        address(slope),
        address(mean),
        address(log_variance),
        0,
        0,
    )


class Memory:
    """Outputs full of NaN between margins that must stay as they are, and inputs whose last byte is their memory's."""

    def __init__(self) -> None:
        self._margins: list[Tensor] = []

    def output(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, shift: int = 0) -> Tensor:
        """NaN-filled, `shift` elements behind a 64-byte boundary."""
        count, width = torch.Size(shape).numel(), dtype.itemsize
        first, last = _MARGIN + shift * width, _MARGIN + (shift + count) * width
        memory = torch.full((last + _MARGIN,), _CANARY, dtype=torch.uint8)
        self._margins += [memory[:first], memory[last:]]
        return memory[first:last].view(dtype).view(shape).fill_(float("nan"))

    def input(self, tensor: Tensor, shift: int = 0) -> Tensor:
        """A copy, `shift` elements behind the start of its memory."""
        memory = torch.empty(shift + tensor.numel(), dtype=tensor.dtype)
        return memory[shift:].view(tensor.shape).copy_(tensor)

    def check(self) -> None:
        """Fails where anything was written beside an output."""
        assert all(bool((margin == _CANARY).all()) for margin in self._margins), "written beside an output"


def same_bits(got: Tensor, want: Tensor) -> bool:
    """The same bits in every element, but for NaNs: which NaN is nobody's promise."""
    got_nan, want_nan = got.isnan(), want.isnan()
    if got.shape != want.shape or not torch.equal(got_nan, want_nan):
        return False
    bits = _BITS[got.dtype]
    return torch.equal(got.view(bits)[~got_nan], want.view(bits)[~want_nan])


def sparse(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros in address space of which only the pages that are touched become memory."""
    reserves_nothing = 0x4000  # MAP_NORESERVE, which Python's mmap names from 3.13 on
    count = torch.Size(shape).numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserves_nothing
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
