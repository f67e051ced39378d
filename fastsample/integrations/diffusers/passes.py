"""A row of a table applied to tensors that a scheduler is given: one pass over memory, in float32 inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsample.ops.backend import choose
from fastsample.ops.memory import fresh, fresh_like, ordinary_tensors
from fastsample.ops.step import step
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import StepPlan, step_once
from fastsample.ops.tracing import differentiable, traced
from fastsample.tables import Table

# Up to this many values copying the operands to where a plan reads them costs less than planning anew.
_SMALL = 1 << 16


class Operand(NamedTuple):
    """What a row reads beside the model's output.

    Attributes:
        x: the state.
        noise: z, or None where the row draws it from `keys` or needs none.
        keys: see fastsample.ops.step.operands.Operands.
        history: the entries of earlier rows, the latest first.
        keeps_entry: whether the row's entry is wanted, which is otherwise not written.
    """

    x: Tensor
    noise: Tensor | None = None
    keys: Tensor | None = None
    history: Sequence[Tensor] = ()
    keeps_entry: bool = True


def apply(table: Table, row: int | Tensor, m: Tensor, given: Operand) -> tuple[Tensor, Tensor]:
    """(x', h): the next state and the row's entry, fresh tensors of float32, or float64 where x is.

    Args:
        m: the model's output, of x's shape or with a variance half, of any floating dtype.
    """
    dtype = torch.float64 if given.x.dtype == torch.float64 else torch.float32
    noise = None if given.noise is None else in_dtype(given.noise, dtype)
    x, history = given.x, [in_dtype(one, dtype) for one in given.history]
    if traced(x, m) or isinstance(row, Tensor) or differentiable(x, m, noise, *history):
        return _followed(table, row, m, Operand(x.to(dtype), noise, given.keys, history, given.keeps_entry))
    backend = choose(None, x.device, native=dtype == torch.float32)
    if backend == "cpu" and given.keys is None and x.numel() <= _SMALL:
        return _small(table, row, m, Operand(x, noise, None, history, given.keeps_entry))
    x = in_dtype(x, dtype)
    entry = fresh_like(x) if given.keeps_entry else None
    plan = StepPlan(Operands(x, table, given.keys, history=history, x0_out=entry), backend, short_cuts=False)
    out = plan(m, row, noise)
    return out, out if entry is None else entry


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes a microsecond even where x has that dtype."""
    return x if x.dtype is dtype else x.to(dtype)


def _followed(table: Table, row: int | Tensor, m: Tensor, given: Operand) -> tuple[Tensor, Tensor]:
    """By the public op, which serves whoever follows it, and rows that the host does not know."""
    entry = torch.empty_like(given.x) if given.keeps_entry else None
    if given.keys is not None or isinstance(row, Tensor):
        operands = Operands(given.x, table, given.keys, history=list(given.history), x0_out=entry)
        out = step_once(operands, m, row, given.noise, None)
    else:
        out = step(given.x, m, table, row, noise=given.noise, history=list(given.history), x0_out=entry)
    return out, out if entry is None else entry


class _Small(NamedTuple):
    """A plan that reads memory of its own."""

    x: Tensor
    entry: Tensor
    history: tuple[Tensor, ...]
    run: StepPlan


def _small(table: Table, row: int, m: Tensor, given: Operand) -> tuple[Tensor, Tensor]:
    x, history = given.x, given.history
    idle: list[_Small] = table.derived((x.shape, len(history)), lambda _: [])
    try:
        plan = idle.pop()  # which no other thread then has
    except IndexError:
        plan = _planned(table, x, len(history))
    plan.x.copy_(x)
    for own, one in zip(plan.history, history, strict=True):
        own.copy_(one)
    out = plan.run(m, row, given.noise)
    entry = plan.entry.clone() if given.keeps_entry else out
    idle.append(plan)
    return out, entry


def _planned(table: Table, x: Tensor, reads: int) -> _Small:
    with ordinary_tensors():
        own, entry, *history = (fresh(x.shape, torch.float32, x.device) for _ in range(2 + reads))
    operands = Operands(own, table, history=history, x0_out=entry)
    return _Small(own, entry, tuple(history), StepPlan(operands, "cpu", short_cuts=False))
