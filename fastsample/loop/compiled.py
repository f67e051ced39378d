"""A run as torch.compile follows it: all rows in one graph, the model's calls and a registered op after each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsample.loop.cached import Cached
from fastsample.loop.guidance import guidance_of
from fastsample.loop.options import CorrectX0, RunOptions
from fastsample.model import Model, unwrapped
from fastsample.ops.backend import choose
from fastsample.ops.noise import INITIAL, normals
from fastsample.ops.noise.keys import sample_keys
from fastsample.ops.step.compiled import functional_step
from fastsample.ops.step.operands import Operands
from fastsample.ops.tracing import constant_when_traced
from fastsample.tables import Table

# What a graph has no place for, with the values that ask for nothing.
_LEFT_OUT = ("noise", "mask", "known", "strength", "callback", "progress", "out")


@torch.no_grad()
def compiled_run(
    table: Table, correct_x0: CorrectX0 | None, model: Model, x: Tensor | Sequence[int], options: RunOptions
) -> Tensor:
    """The sample of a run of this table, see Sampler. The model's input is of `model_dtype`, else float32.

    Raises:
        ValueError: for what a graph has no place for, and for an x that requires gradients.
    """
    _check(table, correct_x0, model, x, options)
    given = x if isinstance(x, Tensor) else None
    shape = torch.Size(x) if given is None else given.shape
    device = options.device if given is None else given.device
    place = torch.device("cpu") if device is None else torch.device(device)
    backend = choose(options.backend, place, native=True)
    keys = None
    if given is None or any(table.stochastic[options.start_step :]):
        keys = sample_keys(options.seed, options.index, shape[0], place)
    if given is None:
        state = normals(shape, keys, 0, INITIAL, place, backend) * table.init_noise_sigma  # type: ignore[arg-type]
    else:
        state = given.to(torch.float32)
    like = state.new_empty(shape[0])
    guidance = guidance_of(like, options, options.model_dtype)
    history: list[Tensor] = []
    for k in range(options.start_step, len(table)):
        guided = guidance.at(table.times[k])
        seen = (state * _scales(table)[k] if table.scaled else state).to(options.model_dtype or torch.float32)
        seen = torch.cat([seen, seen]) if guided else seen
        t = torch.full((len(seen),), table.times[k], dtype=_dtype_of_times(table), device=place)
        m: Any = unwrapped(model(seen, t, **(guidance.both if guided else guidance.conditional)))
        operands = Operands(state, table, keys, guidance.weights, rescale=guidance.rescale, history=history)
        state, entry = functional_step(operands, m, k, None, backend)
        history = [entry, *history][: table.history]
    return state


def _check(
    table: Table, correct_x0: CorrectX0 | None, model: Model, x: Tensor | Sequence[int], options: RunOptions
) -> None:
    given = [name for name in _LEFT_OUT if getattr(options, name) is not None and getattr(options, name) is not False]
    given += ["correct_x0"] if correct_x0 is not None else []
    given += ["cached model"] if isinstance(model, Cached) else []
    given += ["clip=(low, high)"] if table.box is not None else []
    if given:
        raise ValueError(f"compiled, a run takes no {given[0]}: leave it out, or compile the model alone")
    if options.start_step and table.history:
        raise ValueError("compiled, a run of a solver that remembers starts at its first row: leave start_step out")
    if isinstance(x, Tensor) and x.requires_grad:
        raise ValueError("compiled, a run has no gradients: give x.detach()")


@constant_when_traced  # NumPy's arrays are tensors to Dynamo
def _scales(table: Table) -> tuple[float, ...]:
    return tuple(table.e.tolist())


@constant_when_traced
def _dtype_of_times(table: Table) -> torch.dtype:
    return torch.int64 if table.t.dtype.kind == "i" else torch.float32
