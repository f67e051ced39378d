"""The base of the ODE solvers (Euler, Heun, DPM-Solver++): the times and noise levels that they visit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, get_args

from numpy.typing import NDArray

from fastsample.checks import check_number
from fastsample.model import Model, schedule_of
from fastsample.samplers.hints import low_start
from fastsample.samplers.limits import Clip
from fastsample.samplers.sampler import Sampler
from fastsample.samplers.start import steps_left_out
from fastsample.schedule import Float64Array, Schedule, checked_schedule
from fastsample.tables import Table
from fastsample.times.automatic import AUTO
from fastsample.times.continuous import spaced_levels
from fastsample.times.flow import flow_levels
from fastsample.times.levels import noise_levels
from fastsample.times.of_schedule import timesteps_of_schedule
from fastsample.times.predictions import Prediction
from fastsample.times.solver_timesteps import Times, fractional_timesteps
from fastsample.times.timesteps import (
    SPACINGS_OF_SOLVERS,
    SpacingOfSolvers,
    check_spacing,
    one_step_from_the_noisiest,
)


@dataclass(frozen=True)
class Solver(Sampler):
    """A solver of the diffusion ODE, or of a flow's. Subclasses add their arguments and `_rows`.

    A model of prediction "flow" has no schedule: leave it out. Once made, a solver's `steps` is the number of levels it
    visits before the end, and `timesteps` a name or a tuple of their times.

    Args:
        model: ... It is given t float32 where times are fractional (as by default) and for prediction "flow".
        steps: model calls, where `timesteps` is a name; otherwise ignored.
        schedule: ... None for a flow.
        timesteps: "auto", see `ddim`; "linspace" i (T - 1) / (N - 1), not rounded: sigma / alpha is interpolated
            between whole timesteps; "karras" or "log_snr": N levels from that of T - 1 to that of 0 with
            (sigma / alpha)^(1/7) or log SNR evenly spaced, t interpolated; "ays_sd15" or "ays_sdxl": Align Your Steps;
            the times themselves, whole or fractional, such as those of fastsample.optimal_timesteps;
            "leading", "trailing" and the others of fastsample.spaced_timesteps. For a flow "linspace", which "auto" is
            there, "trailing" or times (1000 sigma), see fastsample.times.flow.flow_levels.
        prediction: what the model predicts: "epsilon", "v", "x0", or "flow", the velocity z - x0 of flow
            matching{of_the_model}.
        shift: for a flow: noise levels s become shift s / (1 + (shift - 1) s); 3 for Stable Diffusion 3.
        final_alpha_cumprod: alpha bar after the last step: 1, or `schedule.alphas_cumprod[0]` (diffusers'
            final_sigmas_type="sigma_min").
    """

    schedule: Schedule | None = None
    _: KW_ONLY
    steps: int = 50
    timesteps: Times = AUTO
    prediction: Prediction = "epsilon"
    shift: float = 1.0
    clip: Clip = None
    final_alpha_cumprod: float = 1.0

    _spacing: ClassVar[Callable[..., NDArray[Any]]] = staticmethod(fractional_timesteps)
    _rows_a_step: ClassVar[int] = 1

    def __post_init__(self) -> None:
        t, alpha, sigma = self._levels()
        self._set(steps=len(t), timesteps=self.timesteps if isinstance(self.timesteps, str) else tuple(t.tolist()))
        self._set(table=self._rows(t, alpha, sigma))
        self._set(_low_start=low_start(self.table, self.schedule, self.timesteps))

    def _levels(self) -> tuple[NDArray[Any], Float64Array, Float64Array]:
        """(t, alpha, sigma): the times, shape (N,), the noise levels there and after the last step, (N + 1,)."""
        check_number("shift", self.shift)
        check_number("final_alpha_cumprod", self.final_alpha_cumprod)
        if self.prediction == "flow":
            if self.schedule is not None or self.final_alpha_cumprod != 1:
                raise ValueError(
                    "prediction='flow' takes neither schedule nor final_alpha_cumprod: it has alpha = 1 - sigma"
                )
            named = isinstance(self.timesteps, str) and self.timesteps == AUTO
            return flow_levels("linspace" if named else self.timesteps, self.steps, self.shift)
        schedule = checked_schedule(self.schedule)
        if self.shift != 1:
            raise ValueError(f"shift is for prediction='flow' only, got {self.shift}")
        check_spacing(self.timesteps, SPACINGS_OF_SOLVERS)
        if isinstance(self.timesteps, str) and self.timesteps in get_args(SpacingOfSolvers):
            return spaced_levels(schedule, self.timesteps, self.steps, self.final_alpha_cumprod)
        prediction = "epsilon" if self._amplifies_x0 else self.prediction
        t = timesteps_of_schedule(schedule, self.timesteps, self.steps, prediction)
        if t is None:
            t = self._spacing(schedule.T, self.timesteps, self.steps)
            t = one_step_from_the_noisiest(schedule.T, self.timesteps, t)
        return t, *noise_levels(schedule, t, self.final_alpha_cumprod)

    def _rows(self, t: NDArray[Any], alpha: Float64Array, sigma: Float64Array) -> Table:
        """The table of a run through these times and levels, shapes (N,), (N + 1,) and (N + 1,)."""
        raise NotImplementedError

    def _part(self, strength: float) -> tuple[Table, int]:
        left_out = steps_left_out(self.steps, strength, kept_part=self.prediction == "flow", unit="steps")
        row = self._rows_a_step * left_out
        return (self.table_from(row) if row else self.table), row


def schedule_for(prediction: Prediction, model: Model, schedule: Schedule | None) -> Schedule | None:
    """As `schedule_of`, but without a look at the model for a flow, which has no schedule."""
    return schedule if prediction == "flow" else schedule_of(model, schedule)


def check_passable(sigma: Float64Array) -> None:
    """Raises ValueError where a level before the last is without noise."""
    if (sigma[:-1] == 0).any():
        raise ValueError("a solver cannot pass a level where sigma is 0 (alpha bar 1): leave that timestep out")
