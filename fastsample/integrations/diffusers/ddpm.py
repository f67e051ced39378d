"""DDPMScheduler."""

from __future__ import annotations

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from fastsample.integrations.diffusers.alpha_bars import AnyTimestep, levels_of, rows_of, valid, with_others
from fastsample.integrations.diffusers.base import Generator, Noise, Rows, check_given
from fastsample.ops.noise.keys import Index, Seed
from fastsample.samplers.diffusers.alpha_bars import KINDS, ddpm_columns
from fastsample.samplers.diffusers.reading import Reading


class DDPMScheduler(AnyTimestep, diffusers.DDPMScheduler):
    """diffusers' DDPMScheduler with a step of one pass; it keeps nothing between steps, so threads may share it.

    variance_type "fixed_large_log" is "fixed_large", and "learned" a log variance, as improved-diffusion has it. With
    compat="diffusers" they are what they are there: a square root of a negative number, and of what the model returns.
    A timestep that is not one of the scheduler's leads to the next lower one that is.

    Args:
        compat, **options: see DDIMScheduler.

    Example:
        >>> scheduler = DDPMScheduler(variance_type="learned_range")
        >>> scheduler.set_timesteps(10)
        >>> x, learned = torch.ones(1, 3, 8, 8), torch.zeros(1, 6, 8, 8)
        >>> scheduler.step(learned, 900, x, generator=torch.Generator().manual_seed(0)).prev_sample.shape
        torch.Size([1, 3, 8, 8])
    """

    kind = KINDS["DDPMScheduler"]
    output = DDPMSchedulerOutput

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
        *,
        seed: Seed | None = None,
        index: Index = 0,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """The sample at the timestep after this one, and the x0 that the model's output tells; see diffusers.

        Args:
            timestep, seed, index: see DDIMScheduler.step.
        """
        check_given(model_output, sample)
        rows, row = self._found(timestep)
        if row is None:
            return super().step(model_output, timestep, sample, generator, return_dict)
        noise = Noise(model_output.dtype, generator, None, seed, index)
        computed = self._advanced(rows, row, model_output, sample, noise)
        out, x0 = self._results(model_output, sample, *computed)
        return DDPMSchedulerOutput(prev_sample=out, pred_original_sample=x0) if return_dict else (out, x0)

    def _make_rows(self, reading: Reading, *options: object) -> Rows:
        (everywhere,) = options
        t = with_others(reading, bool(everywhere))
        then_t = t - 1
        if self.custom_timesteps or self.num_inference_steps:
            listed = np.sort(reading.t)
            below = np.searchsorted(listed, t) - 1
            then_t = np.where(below >= 0, listed[np.maximum(below, 0)], -1)
        # In float32 where diffusers' are: of 1 - now / then, next to 0, it is up to 1e-4 that they round away.
        dtype = np.dtype("float64" if self.alphas_cumprod.dtype == torch.float64 else "float32")
        now, then = (levels_of(reading, one, 1.0).astype(dtype) for one in (t, then_t))
        there = valid(reading, now, then) & (now < then)
        t = t[there]
        try:
            columns = ddpm_columns(reading, t, now[there], then[there])
        except ValueError:
            if self.corrects:
                raise
            columns = None
        return rows_of(t, columns, t > 0)
