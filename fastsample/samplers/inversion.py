"""Inversion: the deterministic way from a clean sample to the noise that DDIM, or Euler's method, makes it from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastsample.checks import check_number, one_of
from fastsample.model import Model
from fastsample.samplers.columns import direction_table
from fastsample.samplers.limits import Clip
from fastsample.samplers.sampler import Sampler
from fastsample.samplers.sampling_function import sampling_function
from fastsample.samplers.solver import Solver
from fastsample.samplers.spaced import Spaced
from fastsample.schedule import Float64Array
from fastsample.tables import Table
from fastsample.times.levels import noise_levels
from fastsample.times.predictions import Prediction

Convention = Literal["mirror", "improved"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


class Inversion(Sampler):
    """The rows x' = alpha' x0 + sigma' epsilon from clean data to noise, through the decoder's times and levels.

    Args:
        clip: ... "mirror" keeps the model's epsilon then, "improved" takes it from the new x0, as the code that they
            follow.
        final_alpha_cumprod: that of the decoder; unused by "improved".
        **options: ... `strength`, `mask` and `known` are for sampling only.
    """

    convention: Convention
    prediction: Prediction
    clip: Clip

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        one_of("convention", self.convention, CONVENTIONS)
        mirror, flow = self.convention == "mirror", self.prediction == "flow"
        if mirror and self.prediction == "x0" and sigma[-1] == 0:
            raise ValueError(
                "prediction='x0' does not tell the noise in clean data, where 'mirror' starts: give "
                "final_alpha_cumprod=schedule.alphas_cumprod[0], or convention='improved'"
            )
        t, alpha, sigma = t[::-1], alpha[::-1], sigma[::-1]
        if flow and not mirror:
            t = 1000 * sigma[:-1]
        elif not mirror:
            alpha, sigma = np.append(alpha[1:], 0.0), np.append(sigma[1:], 1.0)
        return direction_table(
            t,
            alpha,
            sigma,
            direction=sigma[1:],
            s=0.0,
            prediction=self.prediction,
            clip=self.clip,
            # Clean data, where the mirror and a flow start, do not tell the noise.
            rederive_epsilon=self.clip is not None and not mirror and not flow,
        )

    def _own_options(self, model: Model, x: Tensor | Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(x, Tensor):
            raise TypeError(f"x0 must be a tensor, the samples to encode, got {type(x).__name__}")
        if options.get("mask") is not None or options.get("known") is not None:
            raise ValueError("mask and known belong to sampling, not to inversion")
        if options.get("strength") is not None:
            raise ValueError("strength adds noise to a clean sample; inversion goes from it as it is")
        return options


@dataclass(frozen=True, kw_only=True)
class DDIMInverse(Inversion, Spaced):
    """Encodes clean samples as noise: DDIM's ODE (Song, Meng & Ermon 2020) run backwards.

    `ddim` with the same arguments, from the result, is the decoder; the error of the round trip is of the order of a
    step where the model is smooth. Where samples have large flat areas at -1 or 1 (drawings) it is not, and "improved"
    does better. From the level of alpha bar a to the noisier one a':

        x0 = (x - sqrt(1 - a) epsilon) / sqrt(a)
        x' = sqrt(a') x0 + sqrt(1 - a') epsilon

    Args:
        convention: with the timesteps t_0 < t_1 < ... and their alpha bars a_0, a_1, ...
            - "mirror": from final_alpha_cumprod to a_0, a_1, ..., each with the model at the timestep that is reached:
              where `ddim` starts from, the levels it passes (diffusers' DDIMInverseScheduler);
            - "improved": x0 counts as level a_0; from a_k to a_(k+1) with the model at t_k, and from the last one to
              alpha bar 0 (improved-diffusion's ddim_reverse_sample).
        prediction: ... "mirror" needs final_alpha_cumprod < 1 for "x0". A flow is inverted by `euler_invert`.

    Raises:
        ValueError: for an unknown convention, and for a prediction that cannot work at one of the levels.

    Example:
        >>> from fastsample import Schedule, ddim
        >>> x0 = torch.ones(1, 3, 8, 8)
        >>> noise = ddim_invert(lambda x, t: 0.1 * x, x0, steps=100)
        >>> round(float(ddim(lambda x, t: 0.1 * x, noise, steps=100).mean()), 2)
        1.03
        >>> inverse = DDIMInverse(Schedule.linear(), steps=10)
        >>> inverse.table.t.tolist()
        [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    """

    steps: int = 50
    convention: Convention = "mirror"
    prediction: Prediction = "epsilon"
    clip: Clip = None
    final_alpha_cumprod: float = 1.0

    def _levels(self, t: NDArray[Any]) -> tuple[Float64Array, Float64Array]:
        check_number("final_alpha_cumprod", self.final_alpha_cumprod)
        if self.prediction == "flow":
            raise ValueError("prediction='flow' has levels of its own: use fastsample.euler_invert")
        return noise_levels(self.schedule, t, self.final_alpha_cumprod if self.convention == "mirror" else 1.0)


@dataclass(frozen=True, kw_only=True)
class EulerInverse(Inversion, Solver):
    """Encodes clean samples as noise: the ODE of `euler` run backwards, that of a flow above all.

    `euler` with the same arguments, from the result, is the decoder; the error of the round trip is of the order of a
    step. From noise level (alpha, sigma) to the noisier one (alpha', sigma'):

        x' = alpha' x0 + sigma' epsilon

    with the x0 and epsilon that the model's output tells. For a flow that is x' = x + (sigma' - sigma) m.

    Args:
        convention: at which of the two levels the model is called.
            - "mirror": at the noisier one, which is reached: where `euler` starts from, the levels it passes;
            - "improved": at the one that x is at. A flow then begins at t = 0 and makes its last call before t = 1000;
              otherwise as for `ddim_invert`.
        clip: ... But a flow keeps the model's own epsilon.

    Raises:
        ValueError: for an unknown convention, and for a prediction that cannot work at one of the levels.

    Example:
        >>> from fastsample import euler
        >>> x0 = torch.ones(1, 3, 8, 8)
        >>> noise = euler_invert(lambda x, t: 0.1 * x, x0, steps=100, prediction="flow")
        >>> round(float(euler(lambda x, t: 0.1 * x, noise, steps=100, prediction="flow").mean()), 2)
        1.0
        >>> inverse = EulerInverse(prediction="flow", steps=4, timesteps="trailing", shift=3.0)
        >>> inverse.table.t.tolist()
        [500.0, 750.0, 900.0, 1000.0]
    """

    convention: Convention = "mirror"


ddim_invert = sampling_function(DDIMInverse, "ddim_invert", x="x0")
euler_invert = sampling_function(EulerInverse, "euler_invert", x="x0")
