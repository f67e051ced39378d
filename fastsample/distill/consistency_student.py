"""A student each of whose calls leads to a clean sample: the model that fastsample.consistency samples from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsample.distill.grid import nearest
from fastsample.distill.jumping_student import JumpingStudent
from fastsample.distill.student import Facts
from fastsample.samplers.consistency import Consistency, scalings
from fastsample.schedule import Schedule
from fastsample.times.levels import sigma_over_alpha

SIGMA_MIN, SIGMA_DATA = 0.002, 1.0


class ConsistencyStudent(JumpingStudent):
    """A consistency model over the timesteps of a schedule, called as fastsample.consistency calls one.

    At noise level s = sigma / alpha of a timestep, x = clean + s z and c_in = 1 / sqrt(s^2 + 1), c_in x is the state
    alpha clean + sigma z that the network knows, and its v, negated, is the model's output: with sigma_data = 1

        x0 = c_skip x + c_out (-v)  =  alpha (c_in x) - sigma v

    but for sigma_min, at which x0 is x itself. Arguments as for Student.
    """

    def __init__(self, network: nn.Module, output: str, schedule: Schedule, facts: Facts) -> None:
        super().__init__(network, output, schedule, facts)
        if schedule.alphas_cumprod[-1] == 0:
            raise ValueError(
                "schedule must not reach alpha bar 0 (zero terminal SNR): a consistency model has no level there"
            )
        self.sigmas = sigma_over_alpha(schedule)
        c_skip, c_out = scalings(self.sigmas, SIGMA_MIN, SIGMA_DATA)
        of_state = c_skip * np.sqrt(self.sigmas**2 + SIGMA_DATA**2)
        # By timestep: what of the state and of the output x0 is, and the time that stands for it.
        self._times = torch.from_numpy((250 * np.log(self.sigmas)).astype(np.float32))
        self.of = torch.from_numpy(np.stack((of_state, c_out))).float()

    def forward(self, x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        """The output for c_in x (B, C, ...) at times 250 ln s (B,)."""
        timestep = self.timestep_of(t)
        prediction = super().forward(x, timestep, **keywords)
        if self.prediction == "v":
            return -prediction
        alpha, sigma = self.levels(timestep, x)
        v = (prediction - sigma * x) / alpha if self.prediction == "epsilon" else (alpha * x - prediction) / sigma
        return -v

    def timestep_of(self, t: Tensor) -> Tensor:
        """The timesteps, int64, nearest to these times."""
        return nearest(self._times.to(t.device), t)

    def time_of(self, timestep: Tensor) -> Tensor:
        """The times 250 ln s of timesteps."""
        return self._times.to(timestep.device)[timestep]

    def sampler(self, steps: int | None = None, stochastic: bool = True) -> Consistency:
        """The sampler of so many steps; None takes the most that it was tried with."""
        sigmas = self.sigmas[list(self.timesteps(steps))]
        return Consistency(sigmas=sigmas, sigma_min=SIGMA_MIN, sigma_data=SIGMA_DATA, clip=self.facts.clip)
