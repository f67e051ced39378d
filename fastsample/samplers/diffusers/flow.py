"""FlowMatchEulerDiscreteScheduler and FlowMatchHeunDiscreteScheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from fastsample.samplers.columns import x0_table
from fastsample.samplers.diffusers.levels import GivenLevels, of_flow, sigmas_of
from fastsample.samplers.diffusers.reading import Kind, Reading
from fastsample.samplers.diffusers.sigmas import once_a_step, remembering_slopes
from fastsample.samplers.euler import Euler
from fastsample.samplers.heun import Heun
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Float64Array
from fastsample.tables import Table


@dataclass(frozen=True, kw_only=True, repr=False)
class FlowMatchEuler(GivenLevels, Euler):
    """Euler's method for a flow, as FlowMatchEulerDiscreteScheduler has it.

    Args:
        inverted: whether the model predicts x0 - z (invert_sigmas, where sigma counts the sample's share).
        stochastic: whether a step goes to x0 and from there to fresh noise (stochastic_sampling).
    """

    inverted: bool = False
    stochastic: bool = False

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        if self.stochastic:
            return x0_table(t, alpha, sigma, prediction="flow", clip=None, b=alpha[1:], s=sigma[1:])
        table = super()._rows(t, alpha, sigma)
        return table.replace(q=-table.q, d=-table.d) if self.inverted else table


@dataclass(frozen=True, kw_only=True, repr=False)
class FlowMatchHeun(GivenLevels, Heun):
    """Heun's method for a flow, as FlowMatchHeunDiscreteScheduler has it."""

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        return remembering_slopes(super()._rows(t, alpha, sigma))


def _euler(reading: Reading) -> Sampler:
    inverted, stochastic = bool(reading.options.get("invert_sigmas")), bool(reading.options.get("stochastic_sampling"))
    if inverted and stochastic:
        raise reading.refused("stochastic_sampling", "with invert_sigmas its last step leads to pure noise")
    sigma = sigmas_of(reading)
    if (sigma > 1).any():
        raise ValueError(f"the sigmas of this {reading.name} must lie in [0, 1], got {sigma.max()}")
    levels = of_flow(reading.t, 1 - sigma if inverted else sigma)
    return FlowMatchEuler(visited=levels, prediction="flow", inverted=inverted, stochastic=stochastic)


def _heun(reading: Reading) -> Sampler:
    levels = of_flow(once_a_step(reading.t), once_a_step(sigmas_of(reading)))
    return FlowMatchHeun(visited=levels, prediction="flow")


KINDS = {
    "FlowMatchEulerDiscreteScheduler": Kind(_euler, frozenset({"invert_sigmas", "stochastic_sampling"})),
    "FlowMatchHeunDiscreteScheduler": Kind(_heun, frozenset()),
}
