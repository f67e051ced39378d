"""DPMSolverMultistepScheduler."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastsample.integrations.diffusers.base import DropIn, Generator, Noise, Rows, check_begun, check_given
from fastsample.ops.noise.keys import Index, Seed
from fastsample.samplers.diffusers import multistep
from fastsample.samplers.diffusers.reading import Reading
from fastsample.tables import Table


class Counted(DropIn):
    """Of solvers that remember what the model's outputs of earlier steps came to: one run at a time."""

    model_outputs: list[Any]
    lower_order_nums: int
    _first: int

    def _next(self, timestep: float | Tensor) -> int:
        """The row of the step that comes now."""
        rows = self._rows(0.0, 0)
        if self._step_index is None:
            self._first = self._index(timestep, rows)
        if self._step_index >= len(rows.table):  # type: ignore[operator]  # `_index` sets it
            raise ValueError(f"all {len(rows.table)} steps have been taken: call set_timesteps for another run")
        return self._step_index  # type: ignore[return-value]

    def _remember(self, entry: Tensor) -> None:
        self.model_outputs = [*self.model_outputs[1:], entry]
        order = self._internal_dict["solver_order"]
        self.lower_order_nums = min(self.lower_order_nums + 1, order)
        self._step_index += 1  # type: ignore[operator]

    def _history(self, count: int) -> list[Tensor]:
        """What the last steps came to, the latest first."""
        return [entry for entry in self.model_outputs[::-1] if entry is not None][:count]


class DPMSolverMultistepScheduler(Counted, diffusers.DPMSolverMultistepScheduler):
    """diffusers' DPMSolverMultistepScheduler, with all its algorithms, with a step of one pass.

    Args:
        compat, **options: see DDIMScheduler. A first timestep that is there twice is an error with compat.
            algorithm_type="sde-dpmsolver" has no solver_order=3.

    Example:
        >>> scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)
        >>> scheduler.set_timesteps(4)
        >>> x = torch.ones(1, 4, 8, 8)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(0.1 * x, t, x, seed=7).prev_sample
        >>> x.shape
        torch.Size([1, 4, 8, 8])
    """

    kind = multistep.KINDS["DPMSolverMultistepScheduler"]
    output = SchedulerOutput
    sigmas: Tensor

    def _check_options(self) -> None:
        super()._check_options()
        if self._internal_dict["algorithm_type"] == "sde-dpmsolver" and self._internal_dict["solver_order"] >= 3:
            raise ValueError("algorithm_type='sde-dpmsolver' has no solver_order=3: take 2, or 'sde-dpmsolver++'")

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        seed: Seed | None = None,
        index: Index = 0,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at the next sigma; see diffusers.

        Args:
            seed, index: see DDIMScheduler.step.
        """
        check_begun(self.num_inference_steps)
        check_given(model_output, sample)
        row = self._next(timestep)
        rows = self._rows(0.0, self._first)
        if not rows.there[row]:
            return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)
        if variance_noise is not None:
            generator = None  # as diffusers has it
        noise = Noise(torch.float32, generator, variance_noise, seed, index)
        out, entry = self._advanced(
            rows, row, model_output, sample, noise, self._history(rows.table.reads[row]), keeps_entry=True
        )
        self._remember(entry)
        (out,) = self._results(model_output, sample, out)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _make_rows(self, reading: Reading, *options: Any) -> Rows:
        (first,) = options
        try:
            sampler = self.kind.make(reading)
            table = sampler.table_from(first) if first else sampler.table
        except ValueError:  # where some step is not finite
            return no_rows(reading)
        return rows_in_turn(reading, table, sde=reading.options["algorithm_type"].startswith("sde"))


def rows_in_turn(reading: Reading, table: Table, *, sde: bool = False, passes: Any = None) -> Rows:
    """The rows of this table, one for each timestep in its order."""
    times = reading.t.tolist()
    row_of = {t: row for row, t in enumerate(times) if times.count(t) == 1}
    return Rows(table, row_of, [sde] * len(times), [True] * len(times), passes=passes)


def no_rows(reading: Reading) -> Rows:
    """None: all steps are diffusers' own, so that they keep their own count of what came before."""
    blank = rows_in_turn(reading, Table(np.zeros(len(reading.t), np.int64)))
    return blank._replace(there=[False] * len(reading.t))
