"""The CUDA kernel of the step, run on the CPU, against the CPU kernel bit for bit, in every mode."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import Table, ops
from support.cuda_on_cpu import calls
from support.cuda_on_cpu.build import ORDERS, CudaOnCpu
from support.cuda_on_cpu.calls import Memory
from support.formula import normal
from support.step_modes import DTYPES, ENTRY, LAST, MIXED, MODES, case

pytest_plugins = ["support.cuda_on_cpu.fixtures"]
pytestmark = pytest.mark.usefixtures("scalar")

NAN = math.nan
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
# Elements of a sample: 8 to a thread where that divides them, else 4; a block of samples and one of a part of a sample.
SHAPES = [
    (1, 1, 1),
    (3, 1, 3),
    (1, 1, 4),
    (3, 1, 5),
    (1, 1, 7),
    (3, 1, 8),
    (3, 2, 56),
    (1, 3, 341),
    (2, 1, 1025),
    (1, 4, 1025),
    (3, 1, 2056),
]


@dataclass
class Outcome:
    """What a step wrote."""

    out: Tensor
    entry: Tensor
    model_input: Tensor

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        yield from (("x'", self.out), ("entry", self.entry), ("u'", self.model_input))


@dataclass
class Layout:
    """Where operands lie: elements behind an aligned address, by name, and what is written in place."""

    shift: dict[str, int] = field(default_factory=dict)
    in_place: bool = False
    entry_over: int | None = None  # which history the entry replaces
    input_dtype: torch.dtype = torch.float16
    input_copies: int = 1


def by_cpu(table: Table, row: int | Tensor, call: dict[str, Any], layout: Layout) -> Outcome:
    """The CPU kernel, on memory of its own."""
    x = call["x"]
    outcome = Outcome(torch.empty_like(x), torch.empty_like(x), input_of(x, layout))
    ops.step(
        table=table,
        row=row,
        out=outcome.out,
        x0_out=outcome.entry,
        input_out=outcome.model_input,
        backend="cpu",
        **call,
    )
    return outcome


def input_of(x: Tensor, layout: Layout) -> Tensor:
    return torch.empty((layout.input_copies * len(x), *x.shape[1:]), dtype=layout.input_dtype)


def by_cuda(
    on_cpu: CudaOnCpu, memory: Memory, table: Table, row: int | Tensor, call: dict[str, Any], layout: Layout
) -> Outcome:
    """The CUDA kernel, with every operand where the layout has it."""

    def placed(name: str, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else memory.input(tensor, layout.shift.get(name, 0))

    def fresh(name: str, like: Tensor) -> Tensor:
        return memory.output(like.shape, like.dtype, layout.shift.get(name, 0))

    given = {**call, "x": placed("x", call["x"]), "model_output": placed("m", call["model_output"])}
    given["history"] = [placed(f"h{i + 1}", one) for i, one in enumerate(call["history"])]
    given["noise"] = placed("z", call.get("noise"))
    x = given["x"]
    assert x is not None
    outcome = Outcome(fresh("out", x), fresh("entry", x), fresh("input", input_of(x, layout)))
    if layout.in_place:
        outcome.out = x
    if layout.entry_over is not None and given["history"]:
        outcome.entry = given["history"][layout.entry_over]
    before = {
        name: value.clone() for name, value in given.items() if isinstance(value, Tensor) and value is not outcome.out
    }
    calls.step(
        on_cpu.module,
        table=table,
        row=row,
        out=outcome.out,
        x0_out=outcome.entry,
        input_out=outcome.model_input,
        **given,
    )
    for name, value in before.items():
        assert calls.same_bits(given[name], value), f"{name} is an input"
    return outcome


def check(
    on_cpu: CudaOnCpu,
    memory: Memory,
    table: Table,
    row: int | Tensor,
    call: dict[str, Any],
    layout: Layout | None = None,
) -> Outcome:
    layout = layout or Layout()
    want = by_cpu(table, row, call, layout)
    got = by_cuda(on_cpu, memory, table, row, call, layout)
    for (name, mine), (_, theirs) in zip(got.parts(), want.parts(), strict=True):
        assert calls.same_bits(mine, theirs), (name, tuple(mine.shape), layout)
    return got


@EACH_DTYPE
@pytest.mark.parametrize("name", MODES)
def test_modes(on_cpu: CudaOnCpu, memory: Memory, name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        table, call = case(name, shape, dtype)
        for row in (0, LAST) if "c1" in MODES[name][0] else (LAST,):
            for noise in (dict(seed=[2**64 - 1, 5, 2**40][: shape[0]]), dict(noise=normal(shape, 6))):
                layout = Layout(input_dtype=dtype, input_copies=1 + (shape[2] % 2))
                check(on_cpu, memory, table, row, {**call, **noise}, layout)


@pytest.mark.parametrize("name", ["x", "m", "z", "h1", "h2", "h3", "out", "entry", "input"])
def test_any_misaligned_operand_takes_the_kernel_that_does_not_mind(
    on_cpu: CudaOnCpu, memory: Memory, name: str
) -> None:
    """A vector access at such an address would end the process: the sanitizer looks at each."""
    for dtype in DTYPES:
        table, call = case("everything", (3, 1, 112), dtype)
        call["noise"] = normal((3, 1, 112), 6)
        taken = []
        for shift in (0, 1, 2, 4):
            on_cpu.launches()
            check(on_cpu, memory, table, LAST, call, Layout({name: shift}, input_dtype=dtype))
            taken.append(step_kernel(on_cpu))
        half = name in ("m", "input") and dtype != torch.float32
        assert taken[0] != taken[1] == taken[2] and (taken[3] == taken[1] if half else taken[3] == taken[0])


def step_kernel(on_cpu: CudaOnCpu) -> str:
    """Name and template arguments of the one launch that wrote the state."""
    (found,) = (launch.kernel for launch in on_cpu.launches() if "step_kernel" in launch.kernel)
    return re.sub(r"\(.*?namespace\)::", "", found).split("(")[0]


@pytest.mark.parametrize("name", [name for name, (columns, *_) in MODES.items() if "c1" in columns])
def test_in_place_and_the_entry_over_a_history(on_cpu: CudaOnCpu, memory: Memory, name: str) -> None:
    for shape in ((2, 1, 1032), (3, 1, 5)):
        table, call = case(name, shape, torch.bfloat16)
        for place in range(table.history):
            check(on_cpu, memory, table, LAST, {**call, "seed": 3}, Layout(in_place=True, entry_over=place))


@EACH_DTYPE
@pytest.mark.parametrize("copies", [1, 2])
def test_next_inputs(on_cpu: CudaOnCpu, memory: Memory, dtype: torch.dtype, copies: int) -> None:
    table = Table([2, 1, 0], a=1.0, d=0.5, e=[9.0, 0.3, 1e-6])
    for shape in ((2, 1, 7), (2, 1, 1032)):
        call = {"x": 1000 * normal(shape, 1), "model_output": normal(shape, 2), "history": ()}
        for row in range(3):
            check(on_cpu, memory, table, row, call, Layout(input_dtype=dtype, input_copies=copies))


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@EACH_DTYPE
def test_rows_of_their_own(on_cpu: CudaOnCpu, memory: Memory, guided: bool, dtype: torch.dtype) -> None:
    rows = torch.tensor([3, 0, 1, -1, 2, 4, 0])
    for shape in ((7, 2, 3), (7, 2, 500)):
        x, *history = (normal(shape, i) for i in (1, 2, 3, 5))
        m = normal((14 if guided else 7, 2 * shape[1], shape[2]), 4, dtype)
        call: dict[str, Any] = dict(x=x, model_output=m, history=history)
        if guided:
            call |= dict(guidance=[7.5, 1.0, 2.0, 7.5, 0.0, 3.0, 7.5], guidance_rescale=0.7)
        for noise in (dict(seed=20), dict(noise=normal(shape, 9))):
            check(on_cpu, memory, MIXED, rows, {**call, **noise})


@pytest.mark.parametrize(
    "columns", [{}, dict(quantile=0.9), dict(limit=0.8, **ENTRY)], ids=["plain", "thresholded", "entry"]
)
def test_rows_that_do_not_exist_give_nan_and_read_nothing_else(
    on_cpu: CudaOnCpu, memory: Memory, columns: dict[str, float]
) -> None:
    """Rows on a device are not seen by the host: it cannot refuse them."""
    table = Table([2, 1, 0], a=1.0, b=0.5, p=1.0, q=0.2, s=0.3, **columns)
    rows = torch.tensor([1, 3, -3, -4, 2**40, -(2**63), 2**63 - 1, 0])
    exists = (rows >= -3) & (rows < 3)
    for size in (5, 1032):
        shape = (8, 1, size)
        call: dict[str, Any] = dict(x=normal(shape, 1), model_output=normal(shape, 2), history=(), seed=range(8))
        for phi in (0.0, 0.7):
            if phi:
                call |= dict(model_output=normal((16, 1, size), 2), guidance=3.0, guidance_rescale=phi)
            got = by_cuda(on_cpu, memory, table, rows, call, Layout())
            want = by_cpu(table, torch.where(exists, rows, 0), call, Layout())
            for (name, mine), (_, theirs) in zip(got.parts(), want.parts(), strict=True):
                assert mine[~exists].isnan().all(), name
                assert calls.same_bits(mine[exists], theirs[exists]), name


def test_operands_without_a_coefficient_are_harmless(on_cpu: CudaOnCpu, memory: Memory) -> None:
    """NaN in what a row multiplies by 0 stays out of x', the entry and the next input."""
    shape = (2, 1, 24)
    nan = torch.full(shape, NAN)
    one_reads = {
        "x": (dict(a=0.5), dict(model_output=nan)),
        "m": (dict(d=0.5), dict(x=nan)),
        "x0 of x": (dict(p=0.5, b=1.0, limit=0.8), dict(model_output=nan)),
        "x0 of m": (dict(q=0.5, b=1.0, limit=0.8), dict(x=nan)),
        "h1": (dict(a=0.5, c1=[0, 0, 0, 0.5]), dict(model_output=nan, history=(normal(shape, 3), nan, nan))),
        "h3": (dict(a=0.5, c3=[0, 0, 0, 0.5]), dict(model_output=nan, history=(nan, nan, normal(shape, 3)))),
        "entry of x": (dict(a=0.5, q=0.5, limit=0.8, hx=0.5, h0=0), dict(model_output=nan)),
        "entry of x0 of m": (dict(d=0.5, q=0.5, limit=0.8, h0=0.5), dict(x=nan)),
        "no noise": (dict(a=0.5, s=[1, 1, 1, 0]), dict(model_output=nan, noise=nan)),
    }
    for name, (columns, operands) in one_reads.items():
        call = {"x": normal(shape, 1), "model_output": normal(shape, 2), "history": (), **operands}
        got = check(on_cpu, memory, Table([3, 2, 1, 0], **columns), 3, call)
        assert got.out.isfinite().all() and got.entry.isfinite().all(), name


@EACH_DTYPE
@pytest.mark.parametrize(
    "columns",
    [{}, dict(limit=1.5), dict(quantile=0.6), dict(limit=1.5, **ENTRY)],
    ids=["free", "clamped", "thresholded", "entry"],
)
def test_zeros_infinities_and_nan(
    on_cpu: CudaOnCpu, memory: Memory, columns: dict[str, float], dtype: torch.dtype
) -> None:
    specials = torch.tensor([0.0, -0.0, math.inf, -math.inf, NAN, 1e-40, -1e-40, 6e4, 3e38, -1e-6])
    x, m = (part.reshape(1, 1, -1) for part in torch.cartesian_prod(specials, specials).T)
    for row in (dict(p=1.0, q=-0.5, a=0.3, b=0.7, d=0.2), dict(p=-1.0, b=1.0), dict(q=1.0, b=1.0, a=-0.0)):
        table = Table([0], **row, **columns)
        for keep in (slice(None), slice(0, 96), x.isfinite().flatten() & m.isfinite().flatten()):
            call = {"x": x[..., keep].contiguous(), "model_output": m[..., keep].contiguous().to(dtype), "history": ()}
            check(on_cpu, memory, table, 0, call, Layout(input_dtype=dtype))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["everything", "rescaled-each-learned"])
def test_any_order_of_threads_and_blocks_will_do(on_cpu: CudaOnCpu, memory: Memory, name: str, order: str) -> None:
    table, call = case(name, (3, 1, 5000), torch.float16)
    with on_cpu.order(order):
        check(on_cpu, memory, table, LAST, {**call, "seed": 1})
