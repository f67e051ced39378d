"""A step's kernel on each backend that has one, ready to be called row after row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsample.ops.address import address, check_dense
from fastsample.ops.backend import cpu_module, cuda_module, place
from fastsample.ops.device_table import packed_rows
from fastsample.ops.dtypes import DTYPE_CODES
from fastsample.ops.step.box import box_of
from fastsample.ops.step.operands import Operands

# kernel(row, m, m_stride, guided, noise, out, keeps_x0, writes_input): one row of the step into `out`. m has m_stride
# elements a sample and, where guided, twice the batch, the unconditional half first; noise may be None.
Kernel = Callable[[int, Tensor, int, bool, Tensor | None, Tensor, bool, bool], None]
# short_cut(m, keeps_x0, writes_input, threads): the same into the operands' out, where m can be read as it is; else it
# has done nothing and is False.
ShortCut = Callable[[Tensor, bool, bool, int], bool]
# Of every shape that m may have: elements from sample to sample, and whether it is guided.
Layouts = dict[torch.Size, tuple[int, bool]]


class Launch(NamedTuple):
    """How a plan calls its kernel.

    Attributes:
        kernel: see Kernel.
        short_cuts: makes the short cuts for outputs of these layouts in these rows; None on a backend without.
        kept: what the kernel reads or writes beside the operands.
        log_prob_sums: what the kernel leaves of the log density, see `log_prob_of_sums`; None where it is not wanted.
    """

    kernel: Kernel
    short_cuts: Callable[[Layouts, list[int]], dict[int, ShortCut]] | None = None
    kept: tuple[Tensor, ...] = ()
    log_prob_sums: Tensor | None = None


def launch(backend: str, operands: Operands) -> Launch:
    """The step's kernel on this backend, which can run.

    The operands are contiguous, checked, on the device of x and in the dtypes that kernels read. Whoever launches keeps
    them alive: kernels of `cpu` and `cuda` know addresses alone.
    """
    address("out", operands.out)  # which is not asked again row after row
    return _LAUNCHES[backend](operands)


def _on_cpu(o: Operands) -> Launch:
    one = o.one_guidance
    if one is None:
        one = o.guidance is not None and len(set(o.guidance.tolist())) == 1
    module, out = cpu_module(), address("out", o.out)
    sums = _log_prob_sums(o, module.log_prob_parts)
    step = module.Step(rows=o.table.packed_address, one_guidance=one, **_addresses(o, sums))

    def short_cuts(layouts: Layouts, rows: list[int]) -> dict[int, ShortCut]:
        outputs = module.PlainOutputs(Tensor, [(shape, *layout) for shape, layout in layouts.items()], [*DTYPE_CODES])
        plain = functools.partial(step.plain, outputs, out)
        return {row: functools.partial(plain, row) for row in rows}

    return Launch(_of_tensors(step, torch.get_num_threads), short_cuts, log_prob_sums=sums)


def _on_cuda(o: Operands) -> Launch:
    cuda, device = cuda_module(), o.x.device
    rows = packed_rows(o.table, device)
    batch, size = _shape(o.x)
    count = cuda.step_workspace(batch, size, o.rescale != 0, o.table.thresholded)
    workspace = torch.empty(count, dtype=torch.uint8, device=device)
    sums = _log_prob_sums(o, cuda.log_prob_parts)
    step = cuda.Step(
        rows=address("table", rows),
        row_count=len(o.table),
        workspace=address("workspace", workspace),
        device=place(device)[0],
        **_addresses(o, sums),
    )
    return Launch(_of_tensors(step, _stream_of(device)), kept=(rows, workspace), log_prob_sums=sums)


def _on_triton(o: Operands) -> Launch:
    from fastsample.kernels.step import Step, log_prob_parts

    rows = packed_rows(o.table, o.x.device)
    h1, h2, h3 = _histories(o)
    low, high = box_of(o.table, o.x)
    sums = _log_prob_sums(o, log_prob_parts)
    step = Step(
        rows=rows,
        row_of=o.rows,
        x=o.x,
        keys=o.keys,
        guidance=o.guidance,
        rescale=o.rescale,
        h1=h1,
        h2=h2,
        h3=h3,
        x0_out=o.x0_out,
        input_out=o.input_out,
        low=low,
        high=high,
        log_prob_sums=sums,
        thresholds=o.table.thresholded,
        host_rows=o.table.packed,
    )

    def kernel(
        row: int, m: Tensor, m_stride: int, guided: bool, noise: Tensor | None, out: Tensor, *writes: bool
    ) -> None:
        for name, tensor in (("model_output", m), ("noise", noise), ("out", out)):
            address(name, tensor)
        step(row, m, m_stride, guided, noise, out, *writes)

    return Launch(kernel, log_prob_sums=sums)


def _of_tensors(step: Callable[..., None], last: Callable[[], int]) -> Kernel:
    """A kernel of addresses as one of tensors; its last argument is the number of threads, or the stream."""

    def kernel(
        row: int,
        m: Tensor,
        m_stride: int,
        guided: bool,
        noise: Tensor | None,
        out: Tensor,
        keeps_x0: bool,
        writes_input: bool,
    ) -> None:
        # What `address` does, in less time: nearly every call has no more than m to look at.
        try:
            of_m = m.data_ptr()
        except RuntimeError:
            of_m = 0
        if not of_m:
            check_dense("model_output", m)
        of_noise = 0 if noise is None else address("noise", noise)
        code = DTYPE_CODES[m.dtype]
        step(row, of_m, m_stride, code, guided, of_noise, out.data_ptr(), keeps_x0, writes_input, last())

    return kernel


def _addresses(o: Operands, log_prob_sums: Tensor | None) -> dict[str, Any]:
    """The arguments that Step of `_cpu` and of `_cuda` share."""
    batch, size = _shape(o.x)
    h1, h2, h3 = _histories(o)
    low, high = box_of(o.table, o.x)
    input_address = address("input_out", o.input_out)
    twice = o.input_out is not None and o.input_out.shape[0] > batch
    half = 0 if o.input_out is None else o.x.numel() * o.input_out.element_size()
    return {
        "row_of": address("row", o.rows),
        "batch": batch,
        "size": size,
        "x": address("x", o.x),
        "keys": address("seed", o.keys),
        "guidance": address("guidance", o.guidance),
        "rescale": o.rescale,
        "thresholds": o.table.thresholded,
        "h1": address("history[0]", h1),
        "h2": address("history[1]", h2),
        "h3": address("history[2]", h3),
        "x0_out": address("x0_out", o.x0_out),
        "input_out": input_address,
        "second_input_out": input_address + half if twice else 0,
        "input_dtype": 0 if o.input_out is None else DTYPE_CODES[o.input_out.dtype],
        "low": address("clip", low),
        "high": address("clip", high),
        "log_prob_sums": address("log_prob_out", log_prob_sums),
    }


def _log_prob_sums(o: Operands, parts: Callable[[int, int], int]) -> Tensor | None:
    if o.log_prob_out is None:
        return None
    batch, size = _shape(o.x)
    return torch.empty(batch, parts(batch, size), 2, dtype=torch.float64, device=o.x.device)


def _histories(o: Operands) -> tuple[Tensor | None, ...]:
    """(h1, h2, h3)."""
    return (*o.history, None, None, None)[:3]


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
