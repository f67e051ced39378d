"""The memory of a run and the plans that step through it, which a later run of the same kind takes over."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsample.loop.model_input import ModelInput
from fastsample.ops.address import address, start_of
from fastsample.ops.backend import cpu_module
from fastsample.ops.memory import fresh, ordinary_tensors
from fastsample.ops.noise import INITIAL, fill
from fastsample.ops.step.operands import Operands
from fastsample.ops.step.prepared import StepPlan
from fastsample.tables import Table

Place = tuple[int, torch.Size, tuple[int, ...]]  # address, shape, strides

_KEPT = 8  # workspaces of a thread that wait for the next run
_LARGEST = 64 << 10  # bytes of a state that is worth keeping: for more, making the memory is a small part of a run


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

    Attributes:
        kind: see Kind.
        input: the model's input, and with it the state.
        state: where the sample comes to be.
        keys: int64 (B,), of the noise.
        weights: of guidance, one per sample; None where no row is guided.
        times: for each row what the model is given where it is not guided, and where it is.
        plans: the step's plans, which take turns; none where the rows step in fresh tensors.
    """

    def __init__(self, kind: Kind, table: Table, *, in_fresh_tensors: bool = False) -> None:
        self.kind, self._table = kind, table
        shape, device, batch = kind.shape, kind.device, kind.shape[0]
        with ordinary_tensors():
            self.input = ModelInput(
                shape, kind.dtype, device, kind.model_dtype, scaled=table.scaled, guided=kind.guided
            )
            self.state = self.input.state
            self.keys = torch.zeros(batch, dtype=torch.int64, device=device)
            self.weights = torch.ones(batch, dtype=kind.dtype, device=device) if kind.guided else None
            self.times = _times(table, 2 * batch if kind.guided else batch, batch, device)
            self._lent = [(name, one, _place(one)) for name, one in self._seen_by_models()]
            self.plans: list[StepPlan] = []
            if in_fresh_tensors:
                return
            self._draw = self._drawing(kind.backend)
            self.plans = plans_in_turn(
                self.state,
                without_x0(table) if kind.corrects else table,
                kind.backend,
                keeps_x0=kind.changes,
                keys=self.keys if kind.draws else None,
                guidance=self.weights,
                one_guidance=kind.one_weight,
                rescale=kind.rescale,
                input_out=None if kind.changes else self.input.target,
            )
            shown = {id(plan.x0_out): plan.x0_out for plan in self.plans if plan.x0_out is not None}
            self._shown = [(name, one, _place(one)) for name, one in self._seen_by_callbacks(shown.values())]

    def draw(self) -> None:
        """x_T of unit deviation from the keys, into the state."""
        if self._draw is None:
            fill(self.state, self.keys, 0, INITIAL, self.kind.backend)
        else:
            self._draw(torch.get_num_threads())

    def _drawing(self, backend: str) -> Callable[[int], None] | None:
        if backend != "cpu":
            return None
        state, batch = self.state, self.kind.shape[0]
        to, keys = address("x", state), address("seed", self.keys)
        return functools.partial(cpu_module().randn, to, batch, state.numel() // batch, keys, 0, INITIAL)

    def replaced(self) -> str | None:
        """The name of an argument whose memory the model has replaced, such as by `x.data = x.data.clamp(-1, 1)`.

        Of the times the last is asked for: models treat all alike.
        """
        return _moved(self._lent)

    def replaced_by_callback(self) -> str | None:
        """As `replaced`, of what a callback was shown; kernels know the addresses of these."""
        return _moved(self._shown)

    def _seen_by_callbacks(self, x0: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
        return [("step.x", self.state), *(("step.x0", one) for one in x0)]

    def _seen_by_models(self) -> list[tuple[str, Tensor]]:
        seen = [("x", self.input.views[0]), ("t", self.times[0][-1])]
        return [*seen, ("x", self.input.views[1]), ("t", self.times[1][-1])] if self.kind.guided else seen


_pool = threading.local()


def taken(kind: Kind, table: Table) -> Workspace:
    """A workspace that nobody else has: one that this thread has left, or a new one."""
    waiting: OrderedDict[Kind, Workspace] | None = getattr(_pool, "waiting", None)
    found = None if waiting is None else waiting.pop(kind, None)
    return Workspace(kind, table) if found is None else found


def leave(workspace: Workspace) -> None:
    """Lets a later run of this thread take the workspace."""
    waiting = _pool.__dict__.setdefault("waiting", OrderedDict())
    waiting[workspace.kind] = workspace
    if len(waiting) > _KEPT:
        waiting.popitem(last=False)


def worth_sharing(kind: Kind) -> bool:
    """Whether a later run is to take over such a workspace: small ones on the CPU.

    On a GPU another stream could still be reading it, and the allocator keeps memory anyway.
    """
    return kind.device.type == "cpu" and kind.shape.numel() * kind.dtype.itemsize <= _LARGEST


def plans_in_turn(state: Tensor, table: Table, backend: str, *, keeps_x0: bool = False, **fixed: Any) -> list[StepPlan]:
    """The plan of a state that is stepped in place, or two that take turns where two earlier x0 are read.

    Each keeps x0 where a later row reads it, over the oldest one; `keeps_x0` where no row does but the caller.
    """
    x0 = [fresh(state.shape, state.dtype, state.device) for _ in range(table.history or int(keeps_x0))]
    turns = [x0, x0[::-1]] if len(x0) == 2 else [x0]
    return [
        StepPlan(
            Operands(
                state,
                table,
                history=history if table.history else (),
                out=state,
                x0_out=history[-1] if history else None,
                **fixed,
            ),
            backend,
        )
        for history in turns
    ]


def without_x0(table: Table) -> Table:
    """The table of a loop that adds b*x0 itself, after correcting x0 and then limiting it (improved-diffusion)."""
    return table.derived("without_x0", lambda own: own.replace(b=0.0, limit=np.inf, quantile=0.0))


def _moved(seen: list[tuple[str, Tensor, Place]]) -> str | None:
    for name, tensor, place in seen:
        if _place(tensor) != place:
            return name
    return None


def _place(tensor: Tensor) -> Place:
    return start_of(tensor), tensor.shape, tensor.stride()


def _times(table: Table, count: int, batch: int, device: torch.device) -> tuple[tuple[Tensor, ...], ...]:
    """Each row's time as the model is given it: the last `batch` of them, and all."""
    on_cpu = torch.from_numpy(table.t.copy())
    if device.type == "cpu":
        times = on_cpu[:, None].expand(-1, count).clone(memory_format=torch.contiguous_format)
    else:
        times = torch.empty((len(table), count), dtype=on_cpu.dtype, device=device)
        for row, t in zip(times.unbind(0), table.times, strict=True):
            row.fill_(t)  # an upload would make the host wait
    whole = times.unbind(0)
    return (whole if count == batch else times[:, -batch:].unbind(0)), whole
