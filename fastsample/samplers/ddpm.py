"""DDPM (Ho, Jain & Abbeel 2020): ancestral sampling, with the variances of Improved DDPM (Nichol & Dhariwal 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastsample.checks import no_such_name
from fastsample.loop.options import CorrectX0
from fastsample.samplers.columns import x0_table
from fastsample.samplers.limits import Clip
from fastsample.samplers.sampling_function import sampling_function
from fastsample.samplers.spaced import Spaced
from fastsample.schedule import Float64Array, Schedule
from fastsample.tables import Table
from fastsample.times.predictions import Prediction
from fastsample.times.timesteps import Timesteps

Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
VARIANCES: tuple[Variance, ...] = get_args(Variance)


@dataclass(frozen=True, kw_only=True)
class DDPM(Spaced):
    """Ancestral sampling (DDPM, Ho, Jain & Abbeel 2020) on any subset of the timesteps, as improved-diffusion does it.

    From timestep t to the next entry of the list, t', with alpha bars a and a' and the respaced beta = 1 - a / a':

        mean       = sqrt(a') beta / (1 - a) x0 + sqrt(1 - beta) (1 - a') / (1 - a) x
        beta_tilde = beta (1 - a') / (1 - a)
        x'         = mean + exp(log_variance / 2) z, without noise in the last row

    That is the posterior q(x' | x, x0) of the process that visits only these timesteps. In the table g0 and g1 hold
    half the log variance in every row; s is 1 in rows that add noise and 0 in the last one, whose variance serves the
    likelihood of the data alone (ops.posterior).

    Args:
        model: ... For a learned variance that half is v, and is read.
        steps: ... None for all T.
        timesteps: ... The default is improved-diffusion's own spacing of `steps`.
        variance: with log_variance
            - "fixed_small": log beta_tilde;
            - "fixed_large": log beta;
            - "learned": v;
            - "learned_range": f log beta + (1 - f) log beta_tilde, f = (v + 1) / 2 (Nichol & Dhariwal 2021).

            The last row, where beta_tilde is 0, takes that of the row before (with fixed_large too).
        clip: ... Improved-diffusion's and diffusers' defaults are 1.

    Raises:
        ValueError: for an unknown variance or prediction, for a prediction that cannot work at one of the levels, and
            where alpha bar is 1 before the end.

    Example:
        >>> ddpm(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
        >>> sampler = DDPM(Schedule.linear(), steps=10)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
        >>> DDPM(Schedule.cosine(500), clip=1.0).steps
        500
    """

    steps: int | None = None
    timesteps: Timesteps = "respaced"
    variance: Variance = "fixed_small"
    prediction: Prediction = "epsilon"
    clip: Clip = None
    correct_x0: CorrectX0 | None = None

    def __post_init__(self) -> None:
        if self.steps is None and isinstance(self.schedule, Schedule):
            self._set(steps=self.schedule.T)
        super().__post_init__()

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        # From alpha bars themselves: their square roots would cost 1 - a / a' several digits.
        alpha_bar = np.append(self.schedule.alphas_cumprod[t], 1.0)
        now, then = alpha_bar[:-1], alpha_bar[1:]
        if (now == 1).any():
            raise ValueError("the posterior is a point where alpha bar is 1: leave that timestep out")
        beta = 1 - now / then
        beta_tilde = beta * (1 - then) / (1 - now)
        return x0_table(
            t,
            alpha,
            sigma,
            prediction=self.prediction,
            clip=self.clip,
            a=np.sqrt(1 - beta) * (1 - then) / (1 - now),
            b=alpha[1:] * beta / (1 - now),
            s=np.append(np.ones(len(t) - 1), 0.0),
            **_half_log_variance(self.variance, beta, beta_tilde),
        )


def _half_log_variance(variance: Variance, beta: Float64Array, beta_tilde: Float64Array) -> dict[str, Any]:
    # The last row's beta_tilde is 0. As in improved-diffusion that of the row before stands in for it; a process of one
    # step has none, and beta is the only bound left.
    smallest = np.log(np.append(beta_tilde[:-1], beta_tilde[-2] if len(beta) > 1 else beta[0]))
    largest = np.log(beta)
    if variance == "fixed_small":
        return {"g0": smallest / 2}
    if variance == "fixed_large":
        return {"g0": np.append(largest[:-1], smallest[-1]) / 2}
    if variance == "learned":
        return {"g1": 0.5}
    if variance == "learned_range":
        return {"g0": (largest + smallest) / 4, "g1": (largest - smallest) / 4}
    raise no_such_name("variance", variance, VARIANCES)


ddpm = sampling_function(DDPM, "ddpm")
