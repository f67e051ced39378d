"""The memory of a run whose rows step over one state in place, and the plans that step over it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsample.loop.correction import corrected, of_x0_alone, without_x0
from fastsample.loop.model_input import ModelInput
from fastsample.loop.options import CorrectX0, Step
from fastsample.loop.start import Level, at_level
from fastsample.loop.turns import plans_in_turn
from fastsample.ops.address import address, start_of
from fastsample.ops.backend import cpu_module
from fastsample.ops.memory import HUGE, fresh, fresh_like, ordinary_tensors
from fastsample.ops.noise import INITIAL, fill
from fastsample.ops.noise.keys import Index, Seed, renew_keys
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import StepPlan
from fastsample.tables import Table

Place = tuple[int, torch.Size, tuple[int, ...]]  # address, shape, strides


class Kind(NamedTuple):
    """What tells whether a run can take over the memory of another.

    Attributes:
        table: the address of the table, which a workspace keeps alive.
        shape, dtype, device: of the state.
        model_dtype: of the model's input.
        guided: whether any row is.
        one_weight: whether all samples have the same guidance weight.
        rescale: phi of guidance rescale.
        draws: whether rows that add noise draw it from keys.
        changes: whether someone may change x after a row, so that the step does not make the next input.
        corrects: whether x0 is replaced after a row, which then leaves b x0 to the loop.
        backend: what runs the rows.
    """

    table: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    model_dtype: torch.dtype
    guided: bool
    one_weight: bool
    rescale: float
    draws: bool
    changes: bool
    corrects: bool
    backend: str


class Workspace:
    """Buffers for a run of this kind, made on the current stream.

    A loop calls `start` and then, before the first row of every run, `renew_times`; after a row `correct` where x0 is
    replaced and `check_shown` where a caller has looked at it; after the last one `check_lent`. What every row reads is
    at hand without a call.

    Attributes:
        kind: see Kind.
        input: the model's input, and with it the state.
        state: the state before the next row; after the last one the sample.
        keys: int64 (B,), of the noise.
        weights: of guidance, one per sample; None where no row is guided.
        times: for each row what the model is given where it is not guided, and where it is; see renew_times.
        plans: the step's plans, which take turns.
        x0, look: what callers see as x0 and the plan that makes it, before the row is taken; None where entries are x0.
    """

    def __init__(self, kind: Kind, table: Table) -> None:
        self.kind, self._table = kind, table
        shape, device, batch = kind.shape, kind.device, kind.shape[0]
        with ordinary_tensors():
            self.input = ModelInput(
                shape, kind.dtype, device, kind.model_dtype, scaled=table.scaled, guided=kind.guided
            )
            self.state = self.input.state
            self.keys = torch.zeros(batch, dtype=torch.int64, device=device)
            self.weights = torch.ones(batch, dtype=kind.dtype, device=device) if kind.guided else None
            self.times, self._time_buffer, self._time_values = times_of_rows(table, kind)
            on_cpu = device.type == "cpu"
            self._time_arrays = (self._time_buffer.numpy(), self._time_values.numpy()) if on_cpu else None
            self.plans = self._plans()
            self.x0 = fresh(shape, kind.dtype, device) if kind.changes and not table.remembers_x0 else None
            self.look = None if self.x0 is None else self._look(self.x0)
        self._draw = self._drawing(kind.backend)
        own = [plan.x0_out for plan in self.plans if plan.x0_out is not None]
        shown = {id(one): one for one in (own if self.x0 is None else [self.x0])}
        self._lent = [(name, one, _place(one)) for name, one in self._seen_by_models()]
        self._shown = [(name, one, _place(one)) for name, one in self._seen_by_callbacks(shown.values())]

    def _plans(self) -> list[StepPlan]:
        """In place there is one, or where rows read several entries, as many that take turns."""
        kind, table = self.kind, self._table
        count = table.history or int(kind.changes)
        return plans_in_turn(
            [self.input],
            [fresh(kind.shape, kind.dtype, kind.device) for _ in range(count)],
            without_x0(table) if kind.corrects else table,
            kind.backend,
            writes_input=not kind.changes,
            keys=self.keys if kind.draws else None,
            guidance=self.weights,
            one_guidance=kind.one_weight,
            rescale=kind.rescale,
        )

    def _look(self, x0: Tensor) -> StepPlan:
        kind, table = self.kind, self._table
        operands = Operands(
            self.state,
            of_x0_alone(without_x0(table) if kind.corrects else table),
            guidance=self.weights,
            one_guidance=kind.one_weight,
            rescale=kind.rescale,
            out=x0,
        )
        return StepPlan(operands, kind.backend)

    def _drawing(self, backend: str) -> Callable[[int], None] | None:
        if backend != "cpu":
            return None
        state, batch = self.state, self.kind.shape[0]
        to, keys = address("x", state), address("seed", self.keys)
        return functools.partial(cpu_module().randn, to, batch, state.numel() // batch, keys, 0, INITIAL)

    def renew_keys(self, seed: Seed | None, index: Index) -> None:
        """The keys of these samples, from now on."""
        renew_keys(self.keys, seed, index)

    def start(self, x: Tensor | None, level: Level | None) -> None:
        """The state before the first row: x itself, x with noise up to a level, or without an x pure noise."""
        state = self.state
        if x is not None:
            # What is not pinned has been read when this returns, so that the host need not wait for the copy.
            state.copy_(x, non_blocking=not state.is_cpu)
            if level is not None:
                at_level(state, level, self.keys, self.kind.backend)
            return
        if self._draw is None:
            fill(state, self.keys, 0, INITIAL, self.kind.backend)
        else:
            self._draw(torch.get_num_threads())
        if self._table.init_noise_sigma != 1:
            state.mul_(self._table.init_noise_sigma)

    def renew_times(self) -> None:
        """Fills in the times, before the first row of every run.

        A model may have changed those of an earlier one: what goes through `t.data` nobody counts.
        """
        if self._time_arrays is None:
            self._time_buffer.copy_(self._time_values)
        else:  # torch's copy takes three times as long, which ten short rows would feel
            to, values = self._time_arrays
            to[...] = values

    def correct(self, correct: CorrectX0, x0: Tensor, entry: Tensor, row: int) -> None:
        """Replaces a row's x0 by what the caller makes of it, and adds to state and entry what the step left out."""
        where = x0.data_ptr()
        x0.copy_(corrected(correct, x0.detach(), self.times[False][row], self._table, row))
        if x0.data_ptr() != where:
            raise ValueError("correct_x0 resized its argument x0, which is the loop's own buffer: return another")
        if entry is not x0:
            entry.add_(x0, alpha=float(self._table.h0[row]))
        self.state.add_(x0, alpha=float(self._table.b[row]))

    def check_shown(self, step: Step, x0: Tensor) -> None:
        """Raises where the caller has replaced the x or x0 that it was shown; kernels know the addresses."""
        state, moved = self.state, _moved(self._shown)
        if step.x is not state or step.x0 is not x0 or moved is not None:
            name = moved or ("step.x" if step.x is not state else "step.x0")
            raise ValueError(f"{name} was replaced or resized: it may only be changed in place, {name}[...] = ...")

    def check_lent(self) -> None:
        """Raises where the model has replaced its argument's memory, such as by `x.data = x.data.clamp(-1, 1)`.

        Of the times the last row's alone are looked at: models treat all rows alike.
        """
        name = _moved(self._lent)
        if name is not None:
            raise ValueError(
                f"the model replaced the memory of its argument {name}, which is the loop's own buffer: let it work on "
                f"a copy, such as {name} = {name}.clone()"
            )

    def result(self, keeps: bool) -> Tensor:
        """The state in storage of its own; it may be the state's own where the workspace does not keep it."""
        if not (keeps or self.input.lends_state):
            return self.state
        with ordinary_tensors():
            small = self.state.nbytes < HUGE
            return self.state.clone() if small else fresh_like(self.state).copy_(self.state)

    def _seen_by_callbacks(self, x0: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
        return [("step.x", self.state), *(("step.x0", one) for one in x0)]

    def _seen_by_models(self) -> list[tuple[str, Tensor]]:
        lent = [("x", view) for view in self.input.views[: 1 + self.kind.guided]]
        last = {id(times): times[-1] for times in self.times}  # those of both halves may be the same
        return [*lent, *(("t", time) for time in last.values())]


Times = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def times_of_rows(table: Table, kind: Kind) -> tuple[Times, Tensor, Tensor]:
    """(times, buffer, values): each row's time as the model is given it where the row is not guided, and where it is;
    the memory of all, which is not filled in yet; and what it is to be filled with."""
    batch, device = kind.shape[0], kind.device
    values = torch.from_numpy(table.t.copy())[:, None]
    if device.type != "cpu":
        values = torch.empty(values.shape, dtype=values.dtype, device=device)
        for row, t in zip(values.unbind(0), table.times, strict=True):
            row.fill_(t)  # an upload would make the host wait
    buffer = torch.empty((len(table), 2 * batch if kind.guided else batch), dtype=values.dtype, device=device)
    whole = buffer.unbind(0)
    return (buffer[:, -batch:].unbind(0) if kind.guided else whole, whole), buffer, values


def _moved(seen: list[tuple[str, Tensor, Place]]) -> str | None:
    """The name of the first tensor that lies elsewhere by now."""
    for name, tensor, place in seen:
        # As _place has it, without a frame in every row that is watched.
        if (start_of(tensor), tensor.shape, tensor.stride()) != place:
            return name
    return None


def _place(tensor: Tensor) -> Place:
    return start_of(tensor), tensor.shape, tensor.stride()
