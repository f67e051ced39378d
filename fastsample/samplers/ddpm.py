"""DDPM (Ho, Jain & Abbeel 2020): ancestral sampling, with the variances of Improved DDPM (Nichol & Dhariwal 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import Unpack

from fastsample.loop.loop import CorrectX0
from fastsample.loop.options import Options
from fastsample.model import Model, schedule_of
from fastsample.samplers.kept import sampler_of
from fastsample.samplers.limits import Clip, limit_columns
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Float64Array, Schedule
from fastsample.tables import Table
from fastsample.times.predictions import x0_coefficients
from fastsample.times.timesteps import Timesteps, spaced_timesteps

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


def ddpm_table(
    t: np.ndarray,
    alpha_bar: Float64Array,
    *,
    variance: str = "fixed_small",
    prediction: str = "epsilon",
    clip: Clip = None,
) -> Table:
    """The rows of q(x' | x, x0), the posterior of the process that visits only these timesteps; see `ddpm`.

    g0 and g1 hold half the log variance in every row; s is 1 in rows that add noise and 0 in the last one, whose
    variance serves the likelihood of the data alone (ops.posterior).

    Args:
        t: times for the model, shape (N,).
        alpha_bar: shape (N + 1,), at those times and, last, 1.
        variance, prediction, clip: as for `ddpm`.

    Raises:
        ValueError: for an unknown variance or prediction, for a prediction that cannot work at one of the levels, and
            where alpha bar is 1 before the end.
    """
    # From alpha bars themselves: their square roots would cost 1 - alpha_bar / alpha_bar' several digits.
    now, then = alpha_bar[:-1], alpha_bar[1:]
    if (now == 1).any():
        raise ValueError("the posterior is a point where alpha bar is 1: leave that timestep out")
    beta = 1 - now / then
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    p, q = x0_coefficients(prediction, alpha[:-1], sigma[:-1])
    return Table(
        t,
        p=p,
        q=q,
        a=np.sqrt(1 - beta) * (1 - then) / (1 - now),
        b=alpha[1:] * beta / (1 - now),
        s=np.append(np.ones(len(beta) - 1), 0.0),
        **_half_log_variance(variance, beta, beta * (1 - then) / (1 - now)),
        **limit_columns(clip),
        alpha=alpha,
        sigma=sigma,
    )


def _half_log_variance(variance: str, beta: Float64Array, beta_tilde: Float64Array) -> dict[str, Any]:
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
    raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")


@dataclass(frozen=True)
class DDPM(Sampler):
    """A DDPM sampler: the arguments of `ddpm` that shape the table. Immutable and reusable, from several threads too.

    Example:
        >>> sampler = DDPM(Schedule.linear(), steps=10)
        >>> sampler(lambda x, t: 0.1 * x, (2, 3, 8, 8), seed=1).shape
        torch.Size([2, 3, 8, 8])
        >>> DDPM(Schedule.cosine(500), clip=1.0).steps
        500
    """

    schedule: Schedule
    steps: int | None = field(default=None, kw_only=True)
    timesteps: Timesteps = field(default="respaced", kw_only=True)
    variance: str = field(default="fixed_small", kw_only=True)
    prediction: str = field(default="epsilon", kw_only=True)
    clip: Clip = field(default=None, kw_only=True)
    correct_x0: CorrectX0 | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.steps is None and isinstance(self.schedule, Schedule):
            self._set(steps=self.schedule.T)
        t = self._spaced(spaced_timesteps)
        self._set(
            table=ddpm_table(
                t,
                np.append(self.schedule.alphas_cumprod[t], 1.0),
                variance=self.variance,
                prediction=self.prediction,
                clip=self.clip,
            )
        )


def ddpm(
    model: Model,
    x: Tensor | Sequence[int],
    *,
    steps: int | None = None,
    schedule: Schedule | None = None,
    timesteps: Timesteps = "respaced",
    variance: str = "fixed_small",
    prediction: str = "epsilon",
    clip: Clip = None,
    correct_x0: CorrectX0 | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Ancestral sampling (DDPM, Ho, Jain & Abbeel 2020) on any subset of the timesteps, as improved-diffusion does it.

    From timestep t to the next entry of the list, t', with alpha bars a and a' and the respaced beta = 1 - a / a':

        mean       = sqrt(a') beta / (1 - a) x0 + sqrt(1 - beta) (1 - a') / (1 - a) x
        beta_tilde = beta (1 - a') / (1 - a)
        x'         = mean + exp(log_variance / 2) z, without noise in the last row

    Args:
        model: as for `ddim`. For a learned variance axis 1 of its output is twice that of x, and the second half is v.
        x: the shape (B, ...) of the result, or x_T itself, as for `ddim`.
        steps: model calls, where `timesteps` names a spacing; None for all T.
        schedule: the one the model was trained with; default `model.schedule`, else Schedule.linear(1000).
        timesteps: see fastsample.spaced_timesteps; default improved-diffusion's own spacing of `steps`.
        variance: with log_variance
            - "fixed_small": log beta_tilde;
            - "fixed_large": log beta;
            - "learned": v;
            - "learned_range": f log beta + (1 - f) log beta_tilde, f = (v + 1) / 2 (Nichol & Dhariwal 2021).

            The last row, where beta_tilde is 0, takes that of the row before (with fixed_large too).
        prediction: what the model predicts: "epsilon", "v" or "x0".
        clip: clamp x0 to [-clip, clip]; a fastsample.DynamicThreshold; None for neither. Improved-diffusion's and
            diffusers' defaults are 1.
        correct_x0: correct_x0(x0, t) returns the x0 to use instead, before clipping.
        **options: the arguments of every sampler, documented in fastsample.Options.

    Returns:
        The sample, float32 (float64 for a float64 x).

    Raises:
        ValueError, TypeError: for arguments that cannot work, before the model is called.

    Example:
        >>> ddpm(lambda x, t: 0.1 * x, (4, 3, 8, 8), steps=10, seed=0).shape
        torch.Size([4, 3, 8, 8])
    """
    sampler = sampler_of(
        DDPM,
        schedule_of(model, schedule),
        steps=steps,
        timesteps=timesteps,
        variance=variance,
        prediction=prediction,
        clip=clip,
        correct_x0=correct_x0,
    )
    return sampler(model, x, **options)
