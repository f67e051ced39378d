"""Trajectory consistency distillation (Zheng et al. 2024): a few steps with as much noise as asked for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from typing_extensions import Unpack

from fastsample.loop.options import CorrectX0, Options
from fastsample.model import Model, schedule_of
from fastsample.samplers.ddim import direction_table
from fastsample.samplers.kept import sampler_of
from fastsample.samplers.limits import Clip, check_number
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Float64Array, Schedule
from fastsample.tables import Table
from fastsample.times.timesteps import Timesteps, spaced_timesteps


def tcd_table(
    t: np.ndarray,
    alphas_cumprod: Float64Array,
    *,
    gamma: float = 0.3,
    prediction: str = "epsilon",
    clip: Clip = None,
    corrects_x0: bool = False,
) -> Table:
    """The rows of TCD through these timesteps and then to timestep 0; see `tcd`.

    Args:
        t: times for the model, int64 of shape (N,), descending.
        alphas_cumprod: of the whole schedule.
        gamma, prediction, clip: as for `tcd`.
        corrects_x0: x0 may be replaced between the model and the step, so epsilon is re-derived as after clipping.

    Raises:
        ValueError: for a gamma outside [0, 1], and for a prediction that cannot work at one of the levels.
    """
    check_number("gamma", gamma)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    visited = np.append(t, 0)
    # In float32 as the published code has it: 0.1 * 10 shall be 1, not 0.9999999999999998.
    between = np.floor(np.float32(1 - gamma) * visited[1:].astype(np.float32)).astype(np.int64)
    alpha_bar, reached = alphas_cumprod[visited], alphas_cumprod[between]
    kept = alpha_bar[1:] / reached
    return direction_table(
        t,
        np.sqrt(alpha_bar),
        np.sqrt(1 - alpha_bar),
        np.sqrt(kept * (1 - reached)),
        np.sqrt(1 - kept),
        prediction=prediction,
        clip=clip,
        rederive_epsilon=clip is not None or corrects_x0,
    )


@dataclass(frozen=True)
class TCD(Sampler):
    """A TCD sampler: the arguments of `tcd` that shape the table. Immutable and reusable, from several threads too.

    Example:
        >>> sampler = TCD(Schedule.scaled_linear(), steps=4, gamma=0.3)
        >>> sampler(lambda x, t: 0.1 * x, (2, 4, 8, 8), seed=1).shape
        torch.Size([2, 4, 8, 8])
    """

    schedule: Schedule
    steps: int = field(default=4, kw_only=True)
    timesteps: Timesteps = field(default="lcm", kw_only=True)
    original_steps: int = field(default=50, kw_only=True)
    gamma: float = field(default=0.3, kw_only=True)
    prediction: str = field(default="epsilon", kw_only=True)
    clip: Clip = field(default=None, kw_only=True)
    correct_x0: CorrectX0 | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        t = self._spaced(functools.partial(spaced_timesteps, original_steps=self.original_steps))
        self._set(
            table=tcd_table(
                t,
                self.schedule.alphas_cumprod,
                gamma=self.gamma,
                prediction=self.prediction,
                clip=self.clip,
                corrects_x0=self.correct_x0 is not None,
            )
        )


def tcd(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int = 4,
    gamma: float = 0.3,
    schedule: Schedule | None = None,
    timesteps: Timesteps = "lcm",
    original_steps: int = 50,
    prediction: str = "epsilon",
    clip: Clip = None,
    correct_x0: CorrectX0 | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Samples by trajectory consistency distillation (Zheng et al. 2024), as diffusers' TCDScheduler does.

    From timestep t to the next entry of the list, t' (0 after the last), by way of t_s = floor((1 - gamma) t'), with
    alpha bars a' and a_s there:

        x_s = sqrt(a_s) x0 + sqrt(1 - a_s) epsilon
        x'  = sqrt(a' / a_s) x_s + sqrt(1 - a' / a_s) z

    so the last row adds no noise, and the result lies at timestep 0.

    Args:
        model: as for `ddim`, distilled by TCD or under its LoRA.
        x: the shape (B, ...) of the result, or x_T itself, as for `ddim`.
        steps: model calls, where `timesteps` names a spacing; at most `original_steps` for "lcm".
        gamma: in [0, 1]: 0 is deterministic, 1 all fresh noise. diffusers calls it eta.
        schedule: the one the model was trained with; default `model.schedule`, else Schedule.linear(1000). Stable
            Diffusion's is Schedule.scaled_linear().
        timesteps: see fastsample.spaced_timesteps; default some of the timesteps of the distillation.
        original_steps: how many timesteps the model was distilled at.
        prediction: what the model predicts: "epsilon", "v" or "x0".
        clip: clamp x0 to [-clip, clip] and take epsilon from it; a fastsample.DynamicThreshold; None for neither.
            TCDScheduler never clips.
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping.
        **options: the arguments of every sampler, documented in fastsample.Options. `strength` leaves steps out, as
            diffusers' image-to-image pipelines do with TCDScheduler.

    Returns:
        The sample, float32 (float64 for a float64 x).

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.

    Example:
        >>> tcd(lambda x, t: 0.1 * x, (2, 4, 8, 8), steps=4, schedule=Schedule.scaled_linear(), seed=0).shape
        torch.Size([2, 4, 8, 8])
    """
    sampler = sampler_of(
        TCD,
        schedule_of(model, schedule),
        steps=steps,
        timesteps=timesteps,
        original_steps=original_steps,
        gamma=gamma,
        prediction=prediction,
        clip=clip,
        correct_x0=correct_x0,
    )
    return sampler(model, x, **options)
