"""EulerDiscreteScheduler, EulerAncestralDiscreteScheduler and HeunDiscreteScheduler: their state is x0 + sigma z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsample.samplers.diffusers.levels import GivenLevels, Levels, of_ratios, sigmas_of
from fastsample.samplers.diffusers.reading import Kind, Reading
from fastsample.samplers.euler import Euler, EulerAncestral
from fastsample.samplers.heun import Heun
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Float64Array
from fastsample.tables import Table


@dataclass(frozen=True, kw_only=True, repr=False)
class SigmaState(GivenLevels):
    """A solver whose state is y = x / alpha, as these schedulers have it; the model is given x = alpha y.

    Args:
        init_noise_sigma: what drawn noise is multiplied by.
    """

    init_noise_sigma: float

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        return in_units_of_x0(super()._rows(t, alpha, sigma), self.init_noise_sigma)


@dataclass(frozen=True, kw_only=True, repr=False)
class EulerDiscrete(SigmaState, Euler):
    """Euler's method as EulerDiscreteScheduler has it."""


@dataclass(frozen=True, kw_only=True, repr=False)
class EulerAncestralDiscrete(SigmaState, EulerAncestral):
    """Euler's ancestral method as EulerAncestralDiscreteScheduler has it."""


@dataclass(frozen=True, kw_only=True, repr=False)
class HeunDiscrete(SigmaState, Heun):
    """Heun's method as HeunDiscreteScheduler has it."""

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        return remembering_slopes(super()._rows(t, alpha, sigma))


def in_units_of_x0(table: Table, init_noise_sigma: float) -> Table:
    """The rows of y = x / alpha in place of x.

    Example:
        >>> from fastsample import Euler, Schedule
        >>> table = in_units_of_x0(Euler(Schedule.scaled_linear(), steps=3, timesteps="karras").table, 14.6)
        >>> table.alpha.tolist(), table.sigma.round(3).tolist()
        ([1.0, 1.0, 1.0, 1.0], [14.615, 1.274, 0.029, 0.0])
    """
    assert table.alpha is not None and table.sigma is not None
    now, then = table.alpha[:-1], table.alpha[1:]
    return table.replace(
        p=table.p * now,
        a=table.a * now / then,
        b=table.b / then,
        c1=table.c1 / then,
        d=table.d / then,
        s=table.s / then,
        e=table.e * now,
        alpha=np.ones_like(table.alpha),
        sigma=table.sigma / table.alpha,
        init_noise_sigma=init_noise_sigma,
    )


def remembering_slopes(table: Table) -> Table:
    """Heun's rows where a corrector averages slopes (x - x0)/sigma, as diffusers' do, its own and the predictor's.

    fastsample.Heun remembers x0 instead, whose differences a long step to little noise multiplies by sigma / sigma'.
    """
    assert table.sigma is not None
    sigma, a, b, c1 = table.sigma[:-1], table.a.copy(), table.b.copy(), table.c1.copy()
    half = (sigma[1::2] - sigma[:-1:2]) / 2
    a[1::2], b[1::2], c1[1::2] = 1 + half / sigma[1::2], -half / sigma[1::2], -half
    return table.replace(a=a, b=b, c1=c1, hx=1 / sigma, h0=-1 / sigma)


def _arguments(reading: Reading, prediction: str, levels: Levels) -> dict[str, Any]:
    drawn = float(reading.scheduler.init_noise_sigma)
    return {"visited": levels, "prediction": prediction, "init_noise_sigma": drawn}


def _euler(reading: Reading) -> Sampler:
    second_name = reading.options["prediction_type"] == "original_sample"
    prediction = "x0" if second_name else reading.prediction("epsilon", "v_prediction", "sample")
    return EulerDiscrete(**_arguments(reading, prediction, of_ratios(reading.t, sigmas_of(reading))))


def _euler_ancestral(reading: Reading) -> Sampler:
    prediction = reading.prediction("epsilon", "v_prediction")
    return EulerAncestralDiscrete(**_arguments(reading, prediction, of_ratios(reading.t, sigmas_of(reading))))


def _heun(reading: Reading) -> Sampler:
    prediction = reading.prediction("epsilon", "v_prediction", "sample")
    levels = of_ratios(once_a_step(reading.t), once_a_step(sigmas_of(reading)))
    return HeunDiscrete(**_arguments(reading, prediction, levels), clip=reading.clip())


def once_a_step(values: NDArray[Any]) -> NDArray[Any]:
    """Heun's schedulers list what belongs to a step twice, but for the first."""
    return np.append(values[:1], values[1::2])


KINDS = {
    "EulerDiscreteScheduler": Kind(_euler, frozenset({"prediction_type"})),
    "EulerAncestralDiscreteScheduler": Kind(_euler_ancestral, frozenset({"prediction_type"})),
    "HeunDiscreteScheduler": Kind(_heun, frozenset({"prediction_type", "clip_sample", "clip_sample_range"})),
}
