"""A step that is checked, planned and run once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsample.ops.backend import choose
from fastsample.ops.checks import (
    check_history,
    check_memory,
    check_rescale,
    check_state,
    checked_rows,
    guidance_weights,
)
from fastsample.ops.memory import mark_written
from fastsample.ops.noise.keys import Index, Seed, sample_keys
from fastsample.ops.step.prepared import StepPlan, visited_rows
from fastsample.ops.tracing import differentiable
from fastsample.tables import Table


class Options(NamedTuple):
    """The keyword arguments of `step`."""

    noise: Tensor | None
    seed: Seed | None
    place: Index  # a tuple has an index of its own
    guidance: float | Sequence[float] | Tensor | None
    guidance_rescale: float
    history: Sequence[Tensor]
    out: Tensor | None
    x0_out: Tensor | None
    input_out: Tensor | None
    backend: str | None


def step_once(
    x: Tensor, model_output: Tensor, table: Table, row: int | Tensor, options: Options, keys: Tensor | None = None
) -> Tensor:
    """`step` on tensors that have values; with these keys where they are made already."""
    noise, seed, index, guidance, guidance_rescale, history, out, x0_out, input_out, backend = options
    check_state(x)
    rows, row = checked_rows(row, table, x)
    visited = range(len(table)) if rows is not None and not rows.is_cpu else visited_rows(rows, row)
    noisy = [k for k in visited if table.stochastic[k]]
    if noisy and noise is not None and not (seed is None and keys is None):
        raise ValueError(f"row {noisy[0]} adds noise once: give noise= or seed=, not both")
    check_history(history)
    outputs = {"out": out, "x0_out": x0_out, "input_out": input_out}
    inputs = {"x": x, "model_output": model_output, "noise": noise}
    check_memory({**inputs, **{f"history[{i}]": one for i, one in enumerate(history)}}, outputs)
    weights = None if guidance is None else guidance_weights(guidance, x)
    if weights is not None and model_output.shape[0] != 2 * x.shape[0]:
        raise ValueError(
            f"under guidance model_output has the unconditional and the conditional half, {2 * x.shape[0]} samples; "
            f"got shape {tuple(model_output.shape)}"
        )
    check_rescale(guidance_rescale, guided=weights is not None)
    native = x.dtype is torch.float32 and not differentiable(
        x, model_output, noise, weights, seed, index, *history, *outputs.values()
    )
    chosen = choose(backend, x.device, native=native)
    draws = bool(noisy) and noise is None
    if keys is None and (draws or seed is not None or type(index) is not int or index != 0):
        # Also where no row reads them, so that what is no seed or place is refused; but nothing is drawn for that.
        keys = sample_keys(seed if draws or seed is not None else 0, index, x.shape[0], x.device)
    plan = StepPlan(
        x,
        table,
        keys=keys,
        guidance=weights,
        rescale=guidance_rescale,
        history=history,
        rows=rows,
        out=out,
        x0_out=x0_out,
        input_out=input_out,
        backend=chosen,
    )
    result = plan(model_output, row, noise)
    for written in outputs.values():
        if written is not None:
            mark_written(written)
    return result
