"""The memory of a run whose rows step over one state in place, and the plans that step over it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from fastsample.loop.correction import corrected, without_x0
from fastsample.loop.inpainting import Inpainting
from fastsample.loop.model_input import ModelInput
from fastsample.loop.options import CorrectX0, Step
from fastsample.loop.start import Level, at_level
from fastsample.loop.turns import plans_in_turn
from fastsample.ops.address import address, start_of
from fastsample.ops.backend import cpu_module
from fastsample.ops.memory import HUGE, fresh, fresh_like, mark_written, ordinary_tensors
from fastsample.ops.noise import INITIAL, fill
from fastsample.ops.noise.keys import Index, Seed, renew_keys
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

    A loop calls `start` once and then, for every row, `model_input` and `step`; `correct` and `paint` where x0 or x is
    replaced after it, `show` and `check_shown` around the time in which a caller looks at it. FreshTensors has the same
    methods.

    Attributes:
        kind: see Kind.
        input: the model's input, and with it the state.
        state: the state before the next row; after the last one the sample.
        x0: the x0 of the last row, once `step` has run.
        keys: int64 (B,), of the noise.
        weights: of guidance, one per sample; None where no row is guided.
        times: for each row what the model is given where it is not guided, and where it is.
        plans: the step's plans, which take turns.
    """

    x0: Tensor

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
            self.times, self._time_buffer = times_of_rows(table, kind)
            self._time_values = self._time_buffer[:, :1].clone()
            self._time_arrays = (self._time_buffer.numpy(), self._time_values.numpy()) if device.type == "cpu" else None
            self.plans = self._plans()
        self._draw = self._drawing(kind.backend)
        shown = {id(plan.x0_out): plan.x0_out for plan in self.plans if plan.x0_out is not None}
        self._lent = [(name, one, _place(one)) for name, one in self._seen_by_models()]
        self._shown = [(name, one, _place(one)) for name, one in self._seen_by_callbacks(shown.values())]

    def _plans(self) -> list[StepPlan]:
        """In place there is one, or where rows read two earlier x0, two that take turns."""
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
        """The times as they are, before the first row of every run.

        A model may have changed those of an earlier one: what goes through `t.data` nobody counts.
        """
        if self._time_arrays is None:
            self._time_buffer.copy_(self._time_values)
        else:  # a third of the time, of which a short run has many
            to, values = self._time_arrays
            to[...] = values

    def rewind(self) -> None:
        """Before the first row of every run: a graph runs the rows more than once, from the same turn."""
        self.renew_times()
        self._turns: Iterator[StepPlan] = cycle(self.plans)

    def model_input(self, row: int, guided: bool) -> tuple[Tensor, Tensor]:
        """(x, t) that the model is called with, made from the state as it is now."""
        self.input.fill(float(self._table.e[row]))
        return self.input.views[guided], self.times[guided][row]

    def step(self, m: Tensor, row: int, z: Tensor | None) -> None:
        """The state after this row of the table, and its x0."""
        plan = next(self._turns)
        plan(m, row, z)
        self.x0 = plan.x0_out  # type: ignore[assignment]  # there is one wherever x may change after a row

    def correct(self, correct: CorrectX0, row: int) -> None:
        """Replaces x0 by what the caller makes of it, and adds to the state what the step has left out."""
        x0 = self.x0
        where = x0.data_ptr()
        x0.copy_(corrected(correct, x0.detach(), self.times[False][row], self._table, row))
        if x0.data_ptr() != where:
            raise ValueError("correct_x0 resized its argument x0, which is the loop's own buffer: return another")
        self.state.add_(x0, alpha=float(self._table.b[row]))

    def paint(self, inpainting: Inpainting, row: int) -> None:
        """Puts the known region into the state."""
        inpainting.apply(self.state, row)

    def show(self) -> None:
        """Before a caller looks: autograd cannot see kernels write, and shall not use what was in these buffers."""
        mark_written(self.state)
        mark_written(self.x0)

    def check_shown(self, step: Step) -> None:
        """Raises where the caller has replaced what it was shown; kernels know the addresses."""
        moved, state = _moved(self._shown), self.state
        if step.x is not state or step.x0 is not self.x0 or moved is not None:
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


def times_of_rows(table: Table, kind: Kind) -> tuple[Times, Tensor]:
    """Each row's time as the model is given it where the row is not guided, and where it is; and the memory of all."""
    batch, device = kind.shape[0], kind.device
    count = 2 * batch if kind.guided else batch
    on_cpu = torch.from_numpy(table.t.copy())
    if device.type == "cpu":
        times = on_cpu[:, None].expand(-1, count).clone(memory_format=torch.contiguous_format)
    else:
        times = torch.empty((len(table), count), dtype=on_cpu.dtype, device=device)
        for row, t in zip(times.unbind(0), table.times, strict=True):
            row.fill_(t)  # an upload would make the host wait
    whole = times.unbind(0)
    return (whole if count == batch else times[:, -batch:].unbind(0), whole), times


def _moved(seen: list[tuple[str, Tensor, Place]]) -> str | None:
    """The name of the first tensor that lies elsewhere by now."""
    for name, tensor, place in seen:
        if _place(tensor) != place:
            return name
    return None


def _place(tensor: Tensor) -> Place:
    return start_of(tensor), tensor.shape, tensor.stride()
