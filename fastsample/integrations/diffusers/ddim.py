"""DDIMScheduler and DDIMInverseScheduler."""

from __future__ import annotations

import diffusers
import numpy as np
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from fastsample.integrations.diffusers.alpha_bars import AnyTimestep, levels_of, rows_of, valid, with_others
from fastsample.integrations.diffusers.base import Generator, Noise, Rows, check_begun, check_given
from fastsample.ops.noise.keys import Index, Seed
from fastsample.samplers.diffusers.alpha_bars import KINDS, ddim_columns
from fastsample.samplers.diffusers.reading import Reading


class DDIMScheduler(AnyTimestep, diffusers.DDIMScheduler):
    """diffusers' DDIMScheduler with a step of one pass; it keeps nothing between steps, so threads may share it.

    A step leads to the next of the scheduler's timesteps. With compat="diffusers" it leads to t - T // N, which is
    another one for timestep_spacing="linspace", and for "trailing" where N does not divide T. Other timesteps than the
    scheduler's lead there too.

    Args:
        compat: "diffusers" repeats what is mistaken there: see docs/diffusers-schedulers.md.
        **options: of diffusers.DDIMScheduler.

    Example:
        >>> scheduler = DDIMScheduler(beta_schedule="scaled_linear")
        >>> scheduler.set_timesteps(4)
        >>> x = torch.ones(1, 4, 8, 8)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(0.1 * x, t, x).prev_sample
        >>> x.shape
        torch.Size([1, 4, 8, 8])
    """

    kind = KINDS["DDIMScheduler"]
    output = DDIMSchedulerOutput

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        seed: Seed | None = None,
        index: Index = 0,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """The sample at the timestep after this one, and the x0 that the model's output tells; see diffusers.

        Args:
            timestep: an int or a tensor, or an int64 tensor (B,) with one for each sample.
            seed, index: noise as the samplers of fastsample draw it in this row, in place of the generator.
        """
        check_begun(self.num_inference_steps)
        check_given(model_output, sample)
        rows, row = self._found(timestep, float(eta), bool(use_clipped_model_output))
        if row is None:
            given = eta, use_clipped_model_output, generator, variance_noise, return_dict
            return super().step(model_output, timestep, sample, *given)
        noise = Noise(model_output.dtype, generator, variance_noise, seed, index)
        computed = self._advanced(rows, row, model_output, sample, noise)
        out, x0 = self._results(model_output, sample, *computed)
        return DDIMSchedulerOutput(prev_sample=out, pred_original_sample=x0) if return_dict else (out, x0)

    def _make_rows(self, reading: Reading, *options: object) -> Rows:
        rederive_epsilon, everywhere = options
        t = with_others(reading, bool(everywhere))
        final = float(reading.scheduler.final_alpha_cumprod)
        then_t = t - reading.T // reading.scheduler.num_inference_steps
        if reading.corrects:
            steps = len(reading.t)
            then_t[:steps] = np.append(t[1:steps], -1)
        now, then = levels_of(reading, t, final), levels_of(reading, then_t, final)
        there = valid(reading, now, then) & ((now < 1) | (not rederive_epsilon))
        t = t[there]
        columns = ddim_columns(reading, t, now[there], then[there], rederive_epsilon=bool(rederive_epsilon))
        return rows_of(t, columns, np.full(len(t), reading.eta > 0))


class DDIMInverseScheduler(AnyTimestep, diffusers.DDIMInverseScheduler):
    """diffusers' DDIMInverseScheduler, from a sample to noise, with a step of one pass that keeps nothing.

    A step comes from the scheduler's timestep before. With compat="diffusers" it comes from t - T // N.

    Args:
        compat, **options: see DDIMScheduler.

    Example:
        >>> scheduler = DDIMInverseScheduler(clip_sample=False)
        >>> scheduler.set_timesteps(2)
        >>> scheduler.step(torch.zeros(1, 3, 8, 8), scheduler.timesteps[0], torch.ones(1, 3, 8, 8)).prev_sample.shape
        torch.Size([1, 3, 8, 8])
    """

    kind = KINDS["DDIMScheduler"]
    output = DDIMSchedulerOutput

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """The sample at this timestep, from the one at the timestep before, and its x0; see diffusers."""
        check_begun(self.num_inference_steps)
        check_given(model_output, sample)
        rows, row = self._found(timestep)
        if row is None:
            return super().step(model_output, timestep, sample, return_dict)
        out, x0 = self._results(model_output, sample, *self._advanced(rows, row, model_output, sample))
        return DDIMSchedulerOutput(prev_sample=out, pred_original_sample=x0) if return_dict else (out, x0)

    def _make_rows(self, reading: Reading, *options: object) -> Rows:
        (everywhere,) = options
        t = with_others(reading, bool(everywhere))
        initial = float(reading.scheduler.initial_alpha_cumprod)
        from_t = np.minimum(t - reading.T // reading.scheduler.num_inference_steps, reading.T - 1)
        if reading.corrects:
            steps = len(reading.t)
            from_t[:steps] = np.append(-1, t[: steps - 1])
        now, then = levels_of(reading, from_t, initial), levels_of(reading, t, initial)
        there = valid(reading, now, then)
        t = t[there]
        return rows_of(t, ddim_columns(reading, t, now[there], then[there]), np.zeros(len(t), bool))
