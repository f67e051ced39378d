"""The step as compiled code sees it: a registered op, which checks its arguments when it runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsample.ops.device_table import as_argument, decoded
from fastsample.ops.memory import fresh
from fastsample.ops.noise import as_int
from fastsample.ops.noise.keys import sample_keys
from fastsample.ops.step.eager import Options, step_once
from fastsample.ops.step.reference import step_reference
from fastsample.tables import Table


def step_recorded(x: Tensor, model_output: Tensor, table: Table, row: int | Tensor, options: Options) -> Tensor:
    """`step` through the registered op, what differs from row to row as tensors."""
    noise, seed, index, guidance, guidance_rescale, history, out, x0_out, input_out, backend = options
    weights = None
    if isinstance(guidance, int | float):
        weights = torch.zeros((), dtype=x.dtype, device=x.device) + guidance
    elif guidance is not None:
        where = guidance.device if isinstance(guidance, Tensor) else "cpu"
        weights = torch.as_tensor(guidance, dtype=x.dtype, device=where).to(x.device)
    # A table's flags, since which row runs may be known on the GPU alone.
    draws = seed is not None or (noise is None and any(table.stochastic))
    arguments = (
        x,
        model_output,
        as_argument(table, x.device),
        0 if isinstance(row, Tensor) else as_int("row", row),
        row if isinstance(row, Tensor) else None,
        noise,
        sample_keys(seed, index, x.shape[0], x.device) if draws else None,
        weights,
        guidance_rescale,
        [*history],
        backend,
    )
    if out is None and x0_out is None and input_out is None:
        result: Tensor = torch.ops.fastsample.step(*arguments)
        return result
    if out is None:
        out = x.new_empty(x.shape)
    torch.ops.fastsample.step_out(*arguments, out, x0_out, input_out)
    return out


def _step_out(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    rows: Tensor | None,
    noise: Tensor | None,
    keys: Tensor | None,
    guidance: Tensor | None,
    guidance_rescale: float,
    history: Sequence[Tensor],
    backend: str | None,
    out: Tensor,
    x0_out: Tensor | None,
    input_out: Tensor | None,
) -> None:
    options = Options(noise, None, 0, guidance, guidance_rescale, history, out, x0_out, input_out, backend)
    step_once(x, model_output, decoded(table), row if rows is None else rows, options, keys)


torch.library.custom_op("fastsample::step_out", _step_out, mutates_args=("out", "x0_out", "input_out"))


# An op of its own: inductor stumbles over one that could write arguments and is given none of them.
@torch.library.custom_op("fastsample::step", mutates_args=())
def _step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    rows: Tensor | None,
    noise: Tensor | None,
    keys: Tensor | None,
    guidance: Tensor | None,
    guidance_rescale: float,
    history: Sequence[Tensor],
    backend: str | None,
) -> Tensor:
    out = fresh(x.shape, x.dtype, x.device)
    operands = x, model_output, table, row, rows, noise, keys, guidance, guidance_rescale, history
    _step_out(*operands, backend, out, None, None)
    return out


@_step.register_fake
def _like_x(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastsample::step_and_x0", mutates_args=())
def _step_and_x0(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    noise: Tensor | None,
    keys: Tensor | None,
    guidance: Tensor | None,
    guidance_rescale: float,
    history: Sequence[Tensor],
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    out, x0 = (fresh(x.shape, x.dtype, x.device) for _ in range(2))
    operands = x, model_output, table, row, None, noise, keys, guidance, guidance_rescale, history
    _step_out(*operands, backend, out, x0, None)
    return out, x0


@_step_and_x0.register_fake
def _both_like_x(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def functional_step(
    x: Tensor,
    m: Tensor,
    table: Table,
    row: int,
    noise: Tensor | None,
    keys: Tensor | None,
    guidance: Tensor | None,
    rescale: float,
    history: Sequence[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(x', x0) in fresh tensors, for a loop that others follow: by torch's own ops, or one registered op."""
    if backend == "reference":
        return step_reference(x, m, table, row, noise, keys, guidance, rescale, history)
    guidance = guidance if m.shape[0] > x.shape[0] else None
    history = [*history][: table.reads[row]]
    noise, keys = (noise, keys) if table.stochastic[row] else (None, None)
    operands = x, m, as_argument(table, x.device), row, noise, None if noise is not None else keys, guidance
    both = torch.ops.fastsample.step_and_x0(*operands, rescale if guidance is not None else 0.0, history, backend)
    return both[0], both[1]
