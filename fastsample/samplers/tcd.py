"""Trajectory consistency distillation (Zheng et al. 2024): a few steps with as much noise as asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsample.checks import check_number
from fastsample.loop.options import CorrectX0
from fastsample.samplers.columns import direction_table
from fastsample.samplers.limits import Clip
from fastsample.samplers.sampling_function import sampling_function
from fastsample.samplers.spaced import Spaced
from fastsample.schedule import Float64Array
from fastsample.tables import Table
from fastsample.times.predictions import Prediction
from fastsample.times.timesteps import Timesteps


@dataclass(frozen=True, kw_only=True)
class TCD(Spaced):
    """Samples by trajectory consistency distillation (Zheng et al. 2024), as diffusers' TCDScheduler does.

    From timestep t to the next entry of the list, t' (0 after the last), by way of t_s = floor((1 - gamma) t'), with
    alpha bars a' and a_s there:

        x_s = sqrt(a_s) x0 + sqrt(1 - a_s) epsilon
        x'  = sqrt(a' / a_s) x_s + sqrt(1 - a' / a_s) z

    so the last row adds no noise, and the result lies at timestep 0.

    Args:
        model: ... Distilled by TCD or under its LoRA.
        steps: ... At most `original_steps` for "lcm".
        schedule: ... Stable Diffusion's is Schedule.scaled_linear().
        timesteps: ... The default takes some of the timesteps of the distillation.
        gamma: in [0, 1]: 0 is deterministic, 1 all fresh noise. diffusers calls it eta.
        clip: ... Epsilon is taken from the new x0. TCDScheduler never clips.
        **options: ... `strength` leaves steps out, as diffusers' image-to-image pipelines do with TCDScheduler.

    Raises:
        ValueError: for a gamma outside [0, 1], and for a prediction that cannot work at one of the levels.

    Example:
        >>> from fastsample import Schedule
        >>> tcd(lambda x, t: 0.1 * x, (2, 4, 8, 8), steps=4, schedule=Schedule.scaled_linear(), seed=0).shape
        torch.Size([2, 4, 8, 8])
        >>> sampler = TCD(Schedule.scaled_linear(), steps=4, gamma=0.3)
        >>> sampler(lambda x, t: 0.1 * x, (2, 4, 8, 8), seed=1).shape
        torch.Size([2, 4, 8, 8])
    """

    steps: int = 4
    timesteps: Timesteps = "lcm"
    original_steps: int = 50
    gamma: float = 0.3
    prediction: Prediction = "epsilon"
    clip: Clip = None
    correct_x0: CorrectX0 | None = None

    def _levels(self, t: NDArray[Any]) -> tuple[Float64Array, Float64Array]:
        alpha_bar = self.schedule.alphas_cumprod[np.append(t, 0)]
        return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        check_number("gamma", self.gamma)
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {self.gamma}")
        then = np.append(t[1:], 0)
        # In float32 as the published code has it: 0.1 * 10 shall be 1, not 0.9999999999999998.
        between = np.floor(np.float32(1 - self.gamma) * then.astype(np.float32)).astype(np.int64)
        a_s = self.schedule.alphas_cumprod[between]
        kept = self.schedule.alphas_cumprod[then] / a_s
        return direction_table(
            t,
            alpha,
            sigma,
            direction=np.sqrt(kept * (1 - a_s)),
            s=np.sqrt(1 - kept),
            prediction=self.prediction,
            clip=self.clip,
            rederive_epsilon=self.clip is not None or self.correct_x0 is not None,
        )


tcd = sampling_function(TCD, "tcd")
