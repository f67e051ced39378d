"""Schedulers whose state is clean data plus sigma times noise, and whose model is given it scaled."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.utils import logging
from torch import Tensor

from fastsample.checks import real
from fastsample.integrations.diffusers.base import (
    DropIn,
    Generator,
    Noise,
    Rows,
    check_given,
    check_is_time,
    counted_rows,
)
from fastsample.integrations.diffusers.compiled import input_in_one_op
from fastsample.integrations.diffusers.passes import in_dtype
from fastsample.ops.noise.keys import Index, Seed
from fastsample.samplers.diffusers import sigmas
from fastsample.samplers.diffusers.reading import Reading
from fastsample.schedule import Float64Array

_log = logging.get_logger(__name__)


class Sigmas(DropIn):
    """Of Euler's schedulers and consistency models': what comes before a step."""

    is_scale_input_called: bool

    @input_in_one_op
    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """What the model is given in place of the sample; see diffusers."""
        rows = self._rows()
        scaled = sample / rows.input_scale[self._index(timestep, rows)]
        self.is_scale_input_called = True
        return scaled

    def _check_timestep(self, timestep: object) -> None:
        check_is_time(self, timestep)
        if not self.is_scale_input_called:
            _log.warning(
                "The `scale_model_input` function should be called before `step` to ensure correct denoising. "
                "See `StableDiffusionPipeline` for a usage example."
            )


def _levels(reading: Reading) -> Float64Array:
    """The sigmas of the steps and the one after them."""
    return reading.array("sigmas")[: len(reading.t) + 1]


def _x0_columns(reading: Reading, sigma: Float64Array) -> dict[str, Any]:
    """p and q of x0 = p y + q m, for the state y = x0 + sigma z and a model that is given y / sqrt(sigma^2 + 1)."""
    prediction = reading.options["prediction_type"]
    if prediction == "epsilon":
        return {"p": 1.0, "q": -sigma}
    if prediction == "v_prediction":
        return {"p": 1 / (sigma**2 + 1), "q": -sigma / np.sqrt(sigma**2 + 1)}
    return {"p": 0.0, "q": 1.0}


class EulerDiscreteScheduler(Sigmas, diffusers.EulerDiscreteScheduler):
    """diffusers' EulerDiscreteScheduler with a step of one pass.

    Args:
        compat, **options: see DDIMScheduler; there is nothing that compat changes.

    Example:
        >>> scheduler = EulerDiscreteScheduler(use_karras_sigmas=True)
        >>> scheduler.set_timesteps(4)
        >>> x = scheduler.init_noise_sigma * torch.ones(1, 4, 8, 8)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(0.1 * scheduler.scale_model_input(x, t), t, x).prev_sample
        >>> x.shape
        torch.Size([1, 4, 8, 8])
    """

    kind = sigmas.KINDS["EulerDiscreteScheduler"]
    output = EulerDiscreteSchedulerOutput
    sigmas: Tensor

    def output_dtypes(self, model_output: torch.dtype, sample: torch.dtype) -> tuple[torch.dtype, ...]:
        return model_output, torch.promote_types(model_output, torch.float32)

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
        return_dict: bool = True,
        *,
        seed: Seed | None = None,
        index: Index = 0,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The sample at the next sigma, and the x0 that the model's output tells; see diffusers.

        Args:
            timestep: one of scheduler.timesteps.
            seed, index: see DDIMScheduler.step. Only churn draws noise.
        """
        check_given(model_output, sample)
        self._check_timestep(timestep)
        churn = tuple(
            real(name, value) for name, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_tmax", s_tmax))
        )
        rows = self._rows(0.0, *churn)
        row = self._index(timestep, rows)
        sample = in_dtype(sample, torch.promote_types(sample.dtype, torch.float32))
        if rows.draws[row]:
            noise = Noise(model_output.dtype, generator, None, seed, index)
            sample, _ = self._advanced(self._rows(0.0, *churn, real("s_noise", s_noise)), row, sample, sample, noise)
        out, x0 = self._advanced(rows, row, model_output, sample)
        self._step_index = row + 1
        out, x0 = self._results(model_output, sample, out, x0)
        return EulerDiscreteSchedulerOutput(prev_sample=out, pred_original_sample=x0) if return_dict else (out, x0)

    def _make_rows(self, reading: Reading, *options: Any) -> Rows:
        """Euler's rows from the levels that churn leads to, or with s_noise those that lead there."""
        s_churn, low, high, *s_noise = options or (0.0, 0.0, np.inf)
        levels = _levels(reading)
        now, then = levels[:-1], levels[1:]
        # As diffusers counts: interpolation_type="log_linear" gives a sigma more than there are steps.
        gamma = min(s_churn / (len(reading.array("sigmas")) - 1), 2**0.5 - 1)
        churned = np.where((low <= now) & (now <= high), now * (1 + gamma), now)
        draws, scale = churned > now, np.sqrt(now**2 + 1)
        if s_noise:
            return counted_rows(reading.t, {"a": 1.0, "s": s_noise[0] * np.sqrt(churned**2 - now**2)}, draws)
        columns = _x0_columns(reading, now)
        if reading.options["prediction_type"] == "epsilon":
            columns["q"] = -churned
        columns |= {"a": then / churned, "b": 1 - then / churned}
        return counted_rows(reading.t, columns, draws, scale)


class EulerAncestralDiscreteScheduler(Sigmas, diffusers.EulerAncestralDiscreteScheduler):
    """diffusers' EulerAncestralDiscreteScheduler with a step of one pass.

    Args:
        compat, **options: see EulerDiscreteScheduler.

    Example:
        >>> scheduler = EulerAncestralDiscreteScheduler()
        >>> scheduler.set_timesteps(4)
        >>> x, t = scheduler.init_noise_sigma * torch.ones(1, 4, 8, 8), scheduler.timesteps[0]
        >>> m = 0.1 * scheduler.scale_model_input(x, t)
        >>> scheduler.step(m, t, x, generator=torch.Generator().manual_seed(0)).prev_sample.shape
        torch.Size([1, 4, 8, 8])
    """

    kind = sigmas.KINDS["EulerAncestralDiscreteScheduler"]
    output = EulerAncestralDiscreteSchedulerOutput
    sigmas: Tensor

    def output_dtypes(self, model_output: torch.dtype, sample: torch.dtype) -> tuple[torch.dtype, ...]:
        return model_output, torch.promote_types(model_output, torch.float32)

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
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The sample at the next sigma, and the x0 that the model's output tells; see diffusers.

        Args:
            timestep: one of scheduler.timesteps.
            seed, index: see DDIMScheduler.step.
        """
        check_given(model_output, sample)
        self._check_timestep(timestep)
        rows = self._rows()
        row = self._index(timestep, rows)
        if not rows.there[row]:
            return super().step(model_output, timestep, sample, generator, return_dict)
        sample = in_dtype(sample, torch.promote_types(sample.dtype, torch.float32))
        out, x0 = self._advanced(
            rows, row, model_output, sample, Noise(model_output.dtype, generator, None, seed, index)
        )
        self._step_index = row + 1
        out, x0 = self._results(model_output, sample, out, x0)
        if not return_dict:
            return out, x0
        return EulerAncestralDiscreteSchedulerOutput(prev_sample=out, pred_original_sample=x0)

    def _make_rows(self, reading: Reading, *options: object) -> Rows:
        if reading.options["prediction_type"] == "sample":
            raise NotImplementedError("prediction_type not implemented yet: sample")
        levels = _levels(reading)
        now, then = levels[:-1], levels[1:]
        with np.errstate(invalid="ignore"):  # where sigmas rise, as the second may with zero SNR: there is no row
            up = np.sqrt(then**2 * (now**2 - then**2)) / now
            down = np.sqrt(then**2 - up**2)
        columns = {"a": down / now, "b": 1 - down / now, "s": up, **_x0_columns(reading, now)}
        return counted_rows(reading.t, columns, True, np.sqrt(now**2 + 1))
