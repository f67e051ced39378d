"""The step as torch.compile, exports and recorders see it: registered ops, which check what they get when they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsample.ops.device_table import as_argument, decoded
from fastsample.ops.memory import fresh
from fastsample.ops.noise import as_int
from fastsample.ops.noise.keys import Index, Seed, sample_keys
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import step_once
from fastsample.ops.step.reference import step_reference

# What the ops are given, in the order of `_arguments`: a row is an int, or a tensor and 0. Programs that were exported
# hold these names and their order.
_ROW = "Tensor x, Tensor model_output, Tensor table, SymInt row"
_REST = "Tensor? noise, Tensor? keys, Tensor? guidance, float guidance_rescale, Tensor[] history, str? backend"
_GIVEN = f"{_ROW}, Tensor? rows, {_REST}"
_WRITTEN = (
    "Tensor(a11!) out, Tensor(a12!)? x0_out, Tensor(a13!)? input_out, Tensor(a14!)? log_prob_out=None"  # came later
)


def _arguments(o: Operands, m: Tensor, row: int | Tensor, noise: Tensor | None, backend: str | None) -> tuple[Any, ...]:
    rows = (0, row) if isinstance(row, Tensor) else (as_int("row", row), None)
    table = as_argument(o.table, o.x.device)
    return o.x, m, table, *rows, noise, o.keys, o.guidance, o.rescale, [*o.history], backend


def _step_out(
    x: Tensor,
    m: Tensor,
    table: Tensor,
    row: int,
    rows: Tensor | None,
    noise: Tensor | None,
    keys: Tensor | None,
    guidance: Tensor | None,
    rescale: float,
    history: Sequence[Tensor],
    backend: str | None,
    *outputs: Tensor | None,
) -> None:
    out, x0_out, input_out, log_prob_out = (*outputs, None)[:4]
    given = Operands(
        *(x, decoded(table), keys),
        rescale=rescale,
        history=history,
        out=out,
        x0_out=x0_out,
        input_out=input_out,
        log_prob_out=log_prob_out,
    )
    step_once(given, m, row if rows is None else rows, noise, backend, guidance=guidance)


def _step(x: Tensor, *given: Any) -> Tensor:
    out = fresh(x.shape, x.dtype, x.device)
    _step_out(x, *given, out, None, None)
    return out


def _step_and_x0(x: Tensor, m: Tensor, table: Tensor, row: int, *given: Any) -> tuple[Tensor, Tensor]:
    out, x0 = (fresh(x.shape, x.dtype, x.device) for _ in range(2))
    _step_out(x, m, table, row, None, *given, out, x0, None)
    return out, x0


def _like_x(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _both_like_x(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


torch.library.custom_op(
    "fastsample::step_out",
    _step_out,
    mutates_args=("out", "x0_out", "input_out", "log_prob_out"),
    schema=f"({_GIVEN}, {_WRITTEN}) -> ()",
)
# An op of its own: inductor stumbles over one that could write arguments and is given none of them.
_fresh = torch.library.custom_op("fastsample::step", _step, mutates_args=(), schema=f"({_GIVEN}) -> Tensor")
_fresh.register_fake(_like_x)
_fresh = torch.library.custom_op(
    "fastsample::step_and_x0", _step_and_x0, mutates_args=(), schema=f"({_ROW}, {_REST}) -> (Tensor, Tensor)"
)
_fresh.register_fake(_both_like_x)


def traced_step(
    given: Operands,
    m: Tensor,
    row: int | Tensor,
    noise: Tensor | None,
    backend: str | None,
    seed: Seed | None,
    index: Index,
    guidance: float | Sequence[float] | Tensor | None,
) -> Tensor:
    """`step_once` through a registered op, what differs from row to row as tensors."""
    x, table = given.x, given.table
    weights = None
    if isinstance(guidance, int | float):
        weights = torch.zeros((), dtype=x.dtype, device=x.device) + guidance
    elif guidance is not None:
        where = guidance.device if isinstance(guidance, Tensor) else "cpu"
        weights = torch.as_tensor(guidance, dtype=x.dtype, device=where).to(x.device)
    # A table's flags, since which row runs may be known on the GPU alone.
    draws = seed is not None or (noise is None and any(table.stochastic))
    keys = sample_keys(seed, index, x.shape[0], x.device) if draws else None
    arguments = _arguments(given._replace(keys=keys, guidance=weights), m, row, noise, backend)
    out, *others = given.out, given.x0_out, given.input_out, given.log_prob_out
    if out is None and others == [None] * 3:
        result: Tensor = torch.ops.fastsample.step(*arguments)
        return result
    out = x.new_empty(x.shape) if out is None else out
    torch.ops.fastsample.step_out(*arguments, out, *others)
    return out


def functional_step(o: Operands, m: Tensor, row: int, noise: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """(x', x0) in fresh tensors, for a loop that others follow: by torch's own ops, or one registered op."""
    if backend == "reference" or o.table.box is not None:
        return step_reference(o.x, m, o.table, row, noise, o.keys, o.guidance, o.rescale, o.history)[:2]
    guided = m.shape[0] > o.x.shape[0]
    if not o.table.stochastic[row]:
        noise = None
    read = o._replace(
        keys=o.keys if o.table.stochastic[row] and noise is None else None,
        guidance=o.guidance if guided else None,
        rescale=o.rescale if guided and o.guidance is not None else 0.0,
        history=o.history[: o.table.reads[row]],
    )
    x, m, table, row, _, *rest = _arguments(read, m, row, noise, backend)
    both = torch.ops.fastsample.step_and_x0(x, m, table, row, *rest)
    return both[0], both[1]
