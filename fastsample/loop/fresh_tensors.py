"""The memory of a run whose rows make new tensors, so that gradients, transforms and recorders can follow it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsample.loop.correction import corrected, of_x0_alone, without_x0
from fastsample.loop.inpainting import Inpainting
from fastsample.loop.options import CorrectX0, Step
from fastsample.loop.start import Level, at_level
from fastsample.loop.workspace import Kind, times_of_rows
from fastsample.ops.noise import INITIAL, normals
from fastsample.ops.noise.keys import Index, Seed, sample_keys
from fastsample.ops.step.compiled import functional_step
from fastsample.ops.step.operands import Operands
from fastsample.tables import Table


class FreshTensors:
    """What a Workspace is to a run in place, in torch's own operations. The model's arguments are made for it alone.

    A loop calls `start` and then, for every row, `model_input` and `step`; `correct` and `paint` where x0 or x is
    replaced after it, `check_shown` where a caller may have looked at it.

    Args:
        kind, table: as for a Workspace.
        weights: of guidance, one per sample; None where no row is guided.
        differentiable: whether gradients go through x itself, which else is cut off.
    """

    def __init__(self, kind: Kind, table: Table, weights: Tensor | None, differentiable: bool) -> None:
        self.kind, self._table, self.weights, self._differentiable = kind, table, weights, differentiable
        self._applied = without_x0(table) if kind.corrects else table
        self.keys = torch.zeros(kind.shape[0], dtype=torch.int64, device=kind.device)
        self._times, buffer, values = times_of_rows(table, kind)
        buffer.copy_(values)
        # Nothing before `start`, but for what is made like it.
        self.state = torch.empty(kind.shape, dtype=kind.dtype, device=kind.device)

    def renew_keys(self, seed: Seed | None, index: Index) -> None:
        self.keys.copy_(sample_keys(seed, index, self.kind.shape[0], self.kind.device))

    def start(self, x: Tensor | None, level: Level | None) -> None:
        kind = self.kind
        if x is None:
            drawn = normals(kind.shape, self.keys, 0, INITIAL, kind.device, kind.backend)
            self.state = drawn * self._table.init_noise_sigma
            return
        x = x.to(kind.device, kind.dtype, copy=True, memory_format=torch.contiguous_format)
        x = x if self._differentiable else x.detach()
        self.state = x if level is None else at_level(x, level, self.keys, kind.backend)

    def model_input(self, row: int, guided: bool) -> tuple[Tensor, Tensor]:
        x = (self.state * float(self._table.e[row])).to(self.kind.model_dtype)
        return torch.cat([x, x]) if guided else x, self._times[guided][row].clone()

    def look(self, m: Tensor, row: int) -> Tensor | None:
        """x0 for callers to see, before the row is taken; None where its entry is that."""
        if self._table.remembers_x0:
            return None
        kind = self.kind
        operands = Operands(self.state, of_x0_alone(self._applied), guidance=self.weights, rescale=kind.rescale)
        return functional_step(operands, m, row, None, kind.backend)[1]

    def step(self, m: Tensor, row: int, z: Tensor | None, history: Sequence[Tensor]) -> Tensor:
        """Makes the state after this row of the table, and returns its entry; history as in Operands."""
        # Generators fill one buffer again and again, which autograd may have kept.
        z = None if z is None else z.clone()
        kind = self.kind
        operands = Operands(self.state, self._applied, self.keys, self.weights, rescale=kind.rescale, history=history)
        self.state, entry = functional_step(operands, m, row, z, kind.backend)
        return entry

    def correct(self, correct: CorrectX0, x0: Tensor, row: int) -> Tensor:
        """Adds to the state what the caller makes of a row's x0, and the step has left out; returns it."""
        x0 = corrected(correct, x0, self._times[False][row].clone(), self._table, row)
        self.state = self.state + x0 * float(self._table.b[row])
        return x0

    def entry(self, entry: Tensor, x0: Tensor, row: int) -> Tensor:
        """The entry of a corrected x0, of what the step has made of it alone."""
        return x0 if self._table.remembers_x0 else entry + x0 * float(self._table.h0[row])

    def paint(self, inpainting: Inpainting, row: int) -> None:
        self.state = self.state.clone()
        inpainting.apply(self.state, row)

    def check_shown(self, step: Step) -> None:
        if step.x is not self.state:
            raise ValueError("step.x was replaced: it may only be changed in place, step.x[...] = ...")

    def result(self, keeps: bool) -> Tensor:
        return self.state
