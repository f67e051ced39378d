"""LCMScheduler, TCDScheduler and CMStochasticIterativeScheduler: of models that jump to clean data."""

from __future__ import annotations

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeSchedulerOutput
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from torch import Tensor

from fastsample.checks import real
from fastsample.integrations.diffusers.alpha_bars import AlphaBars, levels_of, valid
from fastsample.integrations.diffusers.base import Generator, Noise, Rows, check_begun, check_given, counted_rows
from fastsample.integrations.diffusers.sigmas import Sigmas
from fastsample.ops.noise.keys import Index, Seed
from fastsample.samplers.consistency import scalings
from fastsample.samplers.diffusers import distilled
from fastsample.samplers.diffusers.reading import Reading
from fastsample.samplers.lcm import boundary
from fastsample.samplers.limits import limit_columns
from fastsample.schedule import Float64Array
from fastsample.times.predictions import x0_coefficients


class LCMScheduler(AlphaBars, diffusers.LCMScheduler):
    """diffusers' LCMScheduler with a step of one pass.

    The last of the scheduler's timesteps adds no noise. With compat="diffusers" that is the one whose number is
    num_inference_steps, which is not the last where a pipeline has left some out.

    Args:
        compat, **options: see DDIMScheduler.

    Example:
        >>> scheduler = LCMScheduler()
        >>> scheduler.set_timesteps(2)
        >>> x = torch.ones(1, 4, 8, 8)
        >>> for t in scheduler.timesteps:
        ...     x, denoised = scheduler.step(0.1 * x, t, x, seed=7, return_dict=False)
        >>> torch.equal(x, denoised)
        True
    """

    kind = distilled.KINDS["LCMScheduler"]
    output = LCMSchedulerOutput

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
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """The sample at the timestep after this one, and the denoised one; see diffusers.

        Args:
            seed, index: see DDIMScheduler.step.
        """
        check_begun(self.num_inference_steps)
        check_given(model_output, sample)
        rows = self._rows()
        row = self._index(timestep, rows)
        if not rows.there[row]:
            return super().step(model_output, timestep, sample, generator, return_dict)
        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        out, denoised = self._advanced(rows, row, model_output, sample, Noise(dtype, generator, None, seed, index))
        self._step_index = row + 1
        if not rows.draws[row]:
            out = denoised.clone()
        out, denoised = self._results(model_output, sample, out, denoised)
        return LCMSchedulerOutput(prev_sample=out, denoised=denoised) if return_dict else (out, denoised)

    def _make_rows(self, reading: Reading, *options: object) -> Rows:
        t = reading.t.astype(np.int64)
        final = float(reading.scheduler.final_alpha_cumprod)
        now, then = (levels_of(reading, one, final) for one in (t, np.append(t[1:], t[-1])))
        last = len(t) if reading.corrects else reading.scheduler.num_inference_steps
        noisy = np.arange(1, len(t) + 1) != last
        c_skip, c_out = boundary(t, reading.options["timestep_scaling"], 0.5)
        kept = np.where(noisy, np.sqrt(then), 1.0)
        p, q = _of_x0(reading, now)
        columns = {
            "p": p,
            "q": q,
            "hx": c_skip,
            "h0": c_out,
            "a": kept * c_skip,
            "b": kept * c_out,
            "s": np.where(noisy, np.sqrt(1 - then), 0.0),
            **reading.limits(),
        }
        return counted_rows(t, columns, noisy)


class TCDScheduler(AlphaBars, diffusers.TCDScheduler):
    """diffusers' TCDScheduler with a step of one pass.

    Args:
        compat, **options: see DDIMScheduler; there is nothing that compat changes.

    Example:
        >>> scheduler = TCDScheduler()
        >>> scheduler.set_timesteps(4)
        >>> x = torch.ones(1, 4, 8, 8)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(0.1 * x, t, x, eta=0.3, seed=7).prev_sample
        >>> x.shape
        torch.Size([1, 4, 8, 8])
    """

    kind = distilled.KINDS["TCDScheduler"]
    output = TCDSchedulerOutput

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generator = None,
        return_dict: bool = True,
        *,
        seed: Seed | None = None,
        index: Index = 0,
    ) -> TCDSchedulerOutput | tuple[Tensor, Tensor]:
        """The sample at the timestep after this one, and the one it is made of, which has less noise; see diffusers.

        Args:
            eta: gamma of the paper, in [0, 1].
            seed, index: see DDIMScheduler.step.
        """
        check_begun(self.num_inference_steps)
        check_given(model_output, sample)
        assert 0 <= eta <= 1, "eta, gamma of the paper, must lie in [0, 1]"  # as diffusers refuses it
        rows = self._rows(real("eta", eta))
        row = self._index(timestep, rows)
        if not rows.there[row]:
            return super().step(model_output, timestep, sample, eta, generator, return_dict)
        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        out, noised = self._advanced(rows, row, model_output, sample, Noise(dtype, generator, None, seed, index))
        self._step_index = row + 1
        out, noised = self._results(model_output, sample, out, noised)
        return TCDSchedulerOutput(prev_sample=out, pred_noised_sample=noised) if return_dict else (out, noised)

    def _make_rows(self, reading: Reading, *options: object) -> Rows:
        t = reading.t.astype(np.int64)
        then_t = np.append(t[1:], 0)
        # In float32 as there: 0.1 * 10 shall be 1, not 0.9999999999999998.
        between = np.floor(np.float32(1 - reading.eta) * then_t.astype(np.float32)).astype(np.int64)
        now, then, at_s = (levels_of(reading, one, 1.0) for one in (t, then_t, between))
        noisy = (np.arange(len(t)) < len(t) - 1) & (reading.eta > 0)
        kept = np.where(noisy, then / at_s, 1.0)
        with np.errstate(all="ignore"):  # where there is no row
            hx = np.sqrt((1 - at_s) / (1 - now))
            h0 = np.sqrt(at_s) - hx * np.sqrt(now)
        p, q = _of_x0(reading, now)
        noised = {"p": p, "q": q, "hx": hx, "h0": h0}
        columns = {**noised, "a": np.sqrt(kept) * hx, "b": np.sqrt(kept) * h0, "s": np.sqrt(1 - kept)}
        return counted_rows(t, columns, noisy)


class CMStochasticIterativeScheduler(Sigmas, diffusers.CMStochasticIterativeScheduler):
    """diffusers' CMStochasticIterativeScheduler, of consistency models, with a step of one pass.

    Args:
        compat, **options: see DDIMScheduler; there is nothing that compat changes.

    Example:
        >>> scheduler = CMStochasticIterativeScheduler()
        >>> scheduler.set_timesteps(2)
        >>> x = scheduler.init_noise_sigma * torch.ones(1, 3, 8, 8)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(scheduler.scale_model_input(x, t), t, x, seed=7).prev_sample
        >>> x.shape
        torch.Size([1, 3, 8, 8])
    """

    kind = distilled.KINDS["CMStochasticIterativeScheduler"]
    output = CMStochasticIterativeSchedulerOutput
    sigmas: Tensor

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
        *,
        seed: Seed | None = None,
        index: Index = 0,
    ) -> CMStochasticIterativeSchedulerOutput | tuple[Tensor]:
        """The sample at the next sigma; see diffusers.

        Args:
            timestep: one of scheduler.timesteps.
            seed, index: see DDIMScheduler.step.
        """
        check_given(model_output, sample)
        self._check_timestep(timestep)
        rows = self._rows()
        row = self._index(timestep, rows)
        noise = Noise(model_output.dtype, generator, None, seed, index)
        out, _ = self._advanced(rows, row, model_output, sample, noise, keeps_entry=False)
        self._step_index = row + 1
        (out,) = self._results(model_output, sample, out)
        return CMStochasticIterativeSchedulerOutput(prev_sample=out) if return_dict else (out,)

    def _make_rows(self, reading: Reading, *options: object) -> Rows:
        options_, t = reading.options, reading.t
        smallest, data = options_["sigma_min"], options_["sigma_data"]
        sigmas = reading.array("sigmas")
        now, then = sigmas[: len(t)], np.append(sigmas[1:], sigmas[-1])[: len(t)]
        c_skip, c_out = scalings(now, smallest, data)
        # In float32 as there, so that the smallest sigma of all is that of the options.
        reached = np.clip(then, smallest, options_["sigma_max"]).astype(np.float32)
        added = np.sqrt(np.maximum(reached**2 - np.float32(smallest**2), 0.0)) * (len(t) > 1)
        limit = limit_columns(1.0 if options_["clip_denoised"] else None)
        columns = {"p": c_skip, "q": c_out, "b": 1.0, "s": options_["s_noise"] * added, **limit}
        return counted_rows(t, columns, len(t) > 1, np.sqrt(now**2 + data**2))


def _of_x0(reading: Reading, now: Float64Array) -> tuple[Float64Array, Float64Array]:
    """p and q at these alpha bars, NaN where there are none."""
    there = valid(reading, now)
    p, q = np.full_like(now, np.nan), np.full_like(now, np.nan)
    prediction = reading.prediction("epsilon", "v_prediction", "sample")
    p[there], q[there] = x0_coefficients(prediction, np.sqrt(now[there]), np.sqrt(1 - now[there]))
    return p, q
