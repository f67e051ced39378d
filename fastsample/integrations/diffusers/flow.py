"""FlowMatchEulerDiscreteScheduler."""

from __future__ import annotations

import diffusers
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from fastsample.integrations.diffusers.base import (
    DropIn,
    Generator,
    Noise,
    Rows,
    check_given,
    check_is_time,
    counted_rows,
)
from fastsample.ops.noise.keys import Index, Seed
from fastsample.samplers.diffusers import flow
from fastsample.samplers.diffusers.reading import Reading


class FlowMatchEulerDiscreteScheduler(DropIn, diffusers.FlowMatchEulerDiscreteScheduler):
    """diffusers' FlowMatchEulerDiscreteScheduler, of flow-matching models, with a step of one pass.

    Args:
        compat, **options: see DDIMScheduler; there is nothing that compat changes.

    Example:
        >>> scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        >>> scheduler.set_timesteps(4)
        >>> x = torch.ones(1, 16, 8, 8)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(-x, t, x).prev_sample
        >>> x.shape
        torch.Size([1, 16, 8, 8])
    """

    kind = flow.KINDS["FlowMatchEulerDiscreteScheduler"]
    output = FlowMatchEulerDiscreteSchedulerOutput
    _moves_sigmas = True
    sigmas: Tensor

    def output_dtypes(self, model_output: torch.dtype, sample: torch.dtype) -> tuple[torch.dtype, ...]:
        return (model_output,)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generator = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        *,
        seed: Seed | None = None,
        index: Index = 0,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """The sample at the next sigma; see diffusers.

        Args:
            timestep: one of scheduler.timesteps.
            s_churn, s_tmin, s_tmax, s_noise: without effect, as in diffusers.
            per_token_timesteps: with these the step is diffusers' own.
            seed, index: see DDIMScheduler.step. Only stochastic_sampling draws noise.
        """
        check_given(model_output, sample)
        check_is_time(self, timestep)
        rows = self._rows()
        row = self._index(timestep, rows)
        if per_token_timesteps is not None:
            churn = s_churn, s_tmin, s_tmax, s_noise
            return super().step(model_output, timestep, sample, *churn, generator, per_token_timesteps, return_dict)
        noise = Noise(torch.promote_types(sample.dtype, torch.float32), generator, None, seed, index)
        out, _ = self._advanced(rows, row, model_output, sample, noise, keeps_entry=False)
        self._step_index = row + 1
        (out,) = self._results(model_output, sample, out)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _make_rows(self, reading: Reading, *options: object) -> Rows:
        sigma = reading.array("sigmas")[: len(reading.t) + 1]
        now, then = sigma[:-1], sigma[1:]
        stochastic = bool(reading.options.get("stochastic_sampling"))
        columns = {"p": 1.0, "q": -now, "b": 1 - then, "s": then} if stochastic else {"a": 1.0, "d": then - now}
        return counted_rows(reading.t, columns, stochastic)
