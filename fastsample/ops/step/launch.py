"""A step's kernel on each backend that has one, ready to be called row after row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsample.ops.address import address
from fastsample.ops.backend import cpu_module, cuda_module, place
from fastsample.ops.device_table import packed_rows
from fastsample.tables import Table

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # DType in csrc/cpu/kernels.h


class Operands(NamedTuple):
    """What stays the same from row to row: contiguous, checked, on the device of x, in the dtypes that kernels read.

    Whoever launches keeps them alive: kernels of `cpu` and `cuda` know addresses alone.
    """

    table: Table
    rows: Tensor | None
    x: Tensor
    keys: Tensor | None
    guidance: Tensor | None
    one_guidance: bool | None
    rescale: float
    h1: Tensor | None
    h2: Tensor | None
    x0_out: Tensor | None
    input_out: Tensor | None


class Launch(NamedTuple):
    """How a plan calls its kernel.

    Attributes:
        kernel: takes (row, m, m_stride, m_dtype, guided, noise, out, keeps_x0, writes_input, last), where m, noise and
            out are addresses, 0 for no noise; or, where `takes_tensors`, tensors and None, without m_dtype and last.
        last: makes the last argument: the number of threads, or the stream.
        takes_tensors: see kernel.
        kept: what the kernel reads or writes beside the operands.
    """

    kernel: Callable[..., None]
    last: Callable[[], int]
    takes_tensors: bool = False
    kept: tuple[Tensor, ...] = ()


def launch(backend: str, operands: Operands) -> Launch:
    """The step's kernel on this backend, which can run."""
    return _LAUNCHES[backend](operands)


def _on_cpu(o: Operands) -> Launch:
    one = o.one_guidance
    if one is None:
        one = o.guidance is not None and len(set(o.guidance.tolist())) == 1
    kernel = cpu_module().Step(
        rows=o.table.packed_address,
        row_of=address("row", o.rows),
        one_guidance=one,
        **_addresses(o),
    )
    return Launch(kernel, torch.get_num_threads)


def _on_cuda(o: Operands) -> Launch:
    cuda, device = cuda_module(), o.x.device
    rows = packed_rows(o.table, device)
    batch, size = _shape(o.x)
    count = cuda.step_workspace(batch, size, o.rescale != 0, o.table.thresholded)
    workspace = torch.empty(count, dtype=torch.uint8, device=device)
    kernel = cuda.Step(
        rows=address("table", rows),
        row_count=len(o.table),
        row_of=address("row", o.rows),
        workspace=address("workspace", workspace),
        device=place(device)[0],
        **_addresses(o),
    )
    return Launch(kernel, _stream_of(device), kept=(rows, workspace))


def _on_triton(o: Operands) -> Launch:
    from fastsample.kernels.step import Step

    rows = packed_rows(o.table, o.x.device)
    kernel = Step(
        rows=rows,
        row_of=o.rows,
        x=o.x,
        keys=o.keys,
        guidance=o.guidance,
        rescale=o.rescale,
        h1=o.h1,
        h2=o.h2,
        x0_out=o.x0_out,
        input_out=o.input_out,
        thresholds=o.table.thresholded,
        host_rows=o.table.packed,
    )
    return Launch(kernel, _no_stream, takes_tensors=True, kept=(rows,))


def _addresses(o: Operands) -> dict[str, Any]:
    """The arguments that Step of `_cpu` and of `_cuda` share."""
    batch, size = _shape(o.x)
    input_address = address("input_out", o.input_out)
    twice = o.input_out is not None and o.input_out.shape[0] > batch
    half = 0 if o.input_out is None else o.x.numel() * o.input_out.element_size()
    return {
        "batch": batch,
        "size": size,
        "x": address("x", o.x),
        "keys": address("seed", o.keys),
        "guidance": address("guidance", o.guidance),
        "rescale": o.rescale,
        "thresholds": o.table.thresholded,
        "h1": address("history[0]", o.h1),
        "h2": address("history[1]", o.h2),
        "x0_out": address("x0_out", o.x0_out),
        "input_out": input_address,
        "second_input_out": input_address + half if twice else 0,
        "input_dtype": 0 if o.input_out is None else DTYPE_CODES[o.input_out.dtype],
    }


def _shape(x: Tensor) -> tuple[int, int]:
    batch = x.shape[0]
    return batch, x.numel() // batch


def _stream_of(device: torch.device) -> Callable[[], int]:
    if device.type == "cpu":
        return _no_stream
    return functools.partial(torch._C._cuda_getCurrentRawStream, place(device)[0])


def _no_stream() -> int:
    return 0


_LAUNCHES = {"cpu": _on_cpu, "cuda": _on_cuda, "triton": _on_triton}
