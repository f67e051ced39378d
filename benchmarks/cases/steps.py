"""The steps that are measured, each a row from the middle of a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import methods, torch_steps
from benchmarks.cases.methods import Method
from benchmarks.common.options import CPU, Shape
from fastsample import Schedule, Table
from fastsample.ops.noise.keys import sample_keys
from fastsample.ops.step import operands as step_operands
from fastsample.ops.step.prepared import StepPlan

SCHEDULE = Schedule.linear(1000)


class Operands(NamedTuple):
    """What a step reads beside x: the model's output and the entries of earlier rows."""

    m: Tensor
    history: tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One step of one method.

    Attributes:
        name: what it is reported as.
        method: whose step it is.
        steps: of the run whose middle row is taken.
        plain: the same step in plain torch.
        guidance: w; the model's output then holds both halves of the batch.
    """

    name: str
    method: Method
    steps: int
    plain: Callable[..., Tensor | tuple[Tensor, Tensor]]
    guidance: float | None = None

    @cached_property
    def table(self) -> Table:
        """The sampler's own."""
        return self.method.sampler(SCHEDULE, steps=self.steps).table

    @property
    def row(self) -> int:
        """In the middle."""
        return self.steps // 2

    @property
    def learned(self) -> bool:
        """Whether the model's output has a variance half."""
        return self.table.learned[self.row]

    @property
    def streams(self) -> int:
        """Arrays of x's size that a step must read or write: x, m, x', the second half of m, entries and its own."""
        history = self.table.history
        return 3 + (self.guidance is not None) + self.learned + history + (history > 0)

    def operands(self, shape: Shape, device: torch.device = CPU) -> Operands:
        """Random ones for a state of this shape."""
        batch, channels, *rest = shape
        whole = (batch * (1 + (self.guidance is not None)), channels * (1 + self.learned), *rest)
        history = tuple(torch.randn(shape, device=device) for _ in range(self.table.history))
        return Operands(torch.randn(whole, device=device), history)

    def plan(self, x: Tensor, history: tuple[Tensor, ...], table: Table, out: Tensor | None) -> StepPlan:
        """The step as the loop sets it up: its own entry goes where the oldest one was."""
        operands = step_operands.Operands(
            x,
            table,
            keys=sample_keys(0, 0, len(x), x.device) if any(table.stochastic) else None,
            guidance=None if self.guidance is None else x.new_full((len(x),), self.guidance),
            history=history,
            out=out,
            x0_out=history[-1] if history else None,
        )
        return StepPlan(operands)

    def plain_arguments(self, x: Tensor, operands: Operands) -> list[Tensor]:
        """What `plain` is called with: its parameters are named as operands and as columns of the table."""
        columns = list(self.table)[self.row]
        columns["s"] *= math.exp(columns["g0"])
        earlier = dict(zip(("h1", "h2", "h3"), operands.history, strict=False))
        values = {"x": x, "m": operands.m, "w": self.guidance, **earlier, **columns}
        return [torch.as_tensor(values[name], device=x.device) for name in inspect.signature(self.plain).parameters]


DDIM_STEP = Case("ddim", methods.DDIM_FREE, 50, torch_steps.ddim)
NOISE_FREE = (
    DDIM_STEP,
    Case("ddim clip", methods.DDIM_CLIP, 50, torch_steps.clipped_ddim),
    Case("dpm_solver 2M", methods.DPM_SOLVER, 20, torch_steps.dpm_solver),
    Case("deis 3", methods.DEIS_LOG, 20, torch_steps.deis),
    Case("ipndm 4", methods.IPNDM_FREE, 20, torch_steps.ipndm),
    Case("guided ddim", methods.DDIM_FREE, 50, torch_steps.guided_ddim, guidance=7.5),
)
NOISY = (
    Case("ddim eta 1 clip", methods.ANCESTRAL, 50, torch_steps.ancestral_ddim),
    Case("ddpm", methods.DDPM_SMALL, 50, torch_steps.ddpm),
    Case("ddpm learned_range", methods.DDPM_LEARNED, 50, torch_steps.learned_ddpm),
    Case("lcm", methods.LCM_FREE, 4, torch_steps.lcm),
    Case("tcd", methods.TCD_FREE, 4, torch_steps.tcd),
)
