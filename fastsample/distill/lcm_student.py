"""A latent consistency model: the model that fastsample.lcm samples from."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fastsample.distill.jumping_student import JumpingStudent
from fastsample.distill.student import Facts
from fastsample.samplers.lcm import LCM, boundary
from fastsample.schedule import Schedule
from fastsample.times.predictions import x0_coefficients


class LCMStudent(JumpingStudent):
    """A model that keeps what its teacher predicts, and jumps to x0 as fastsample.lcm has it:

        f(x, t) = c_skip(t) x + c_out(t) x0(x, t)

    Arguments as for Student.
    """

    def __init__(self, network: nn.Module, output: str, schedule: Schedule, facts: Facts) -> None:
        super().__init__(network, output, schedule, facts)
        timesteps = np.arange(schedule.T)
        c_skip, c_out = boundary(timesteps, LCM.timestep_scaling, LCM.sigma_data)
        # At alpha bar 0 a model of epsilon tells nothing, and is not asked.
        alpha, sigma = np.maximum(np.sqrt(schedule.alphas_cumprod), 1e-12), np.sqrt(1 - schedule.alphas_cumprod)
        p, q = x0_coefficients(self.prediction, alpha, sigma)
        # By timestep: what of the state and of the output x0 is.
        self.of = torch.from_numpy(np.stack((c_skip + c_out * p, c_out * q))).float()

    def sampler(self, steps: int | None = None, stochastic: bool = True) -> LCM:
        """The sampler of so many steps; None takes the most that it was tried with."""
        times = self.timesteps(steps)
        return LCM(self.schedule, timesteps=times, prediction=self.prediction, clip=self.facts.clip)
