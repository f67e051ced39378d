"""What the ODE solvers (Euler, Heun, DPM-Solver++) share: which noise levels they visit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from numpy.typing import NDArray

from fastsample.loop.start import steps_left_out
from fastsample.model import Model, schedule_of
from fastsample.samplers.limits import Clip, check_number
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Float64Array, Schedule, checked_schedule
from fastsample.tables import Table
from fastsample.times.continuous import spaced_levels
from fastsample.times.flow import flow_levels
from fastsample.times.levels import noise_levels
from fastsample.times.timesteps import one_step_from_the_noisiest

Times = str | Iterable[float]


@dataclass(frozen=True)
class Solver(Sampler):
    """The arguments that every solver has, and the noise levels that they mean. Subclasses build the table.

    A model of prediction "flow" has no schedule: leave it out.
    """

    schedule: Schedule | None = None
    steps: int = field(default=50, kw_only=True)
    timesteps: Times = field(default="linspace", kw_only=True)
    prediction: str = field(default="epsilon", kw_only=True)
    shift: float = field(default=1.0, kw_only=True)
    clip: Clip = field(default=None, kw_only=True)
    final_alpha_cumprod: float = field(default=1.0, kw_only=True)

    _rows_a_step: ClassVar[int] = 1

    def _levels(self, spaced: Callable[..., NDArray]) -> tuple[NDArray, Float64Array, Float64Array]:
        """(t, alpha, sigma), with `spaced` in place of spaced_timesteps; stores the times and their number."""
        check_number("shift", self.shift)
        check_number("final_alpha_cumprod", self.final_alpha_cumprod)
        if self.prediction == "flow":
            if self.schedule is not None or self.final_alpha_cumprod != 1:
                raise ValueError(
                    "prediction='flow' takes neither schedule nor final_alpha_cumprod: it has alpha = 1 - sigma"
                )
            t, alpha, sigma = flow_levels(self.timesteps, self.steps, self.shift)
        else:
            schedule = checked_schedule(self.schedule)
            if self.shift != 1:
                raise ValueError(f"shift is for prediction='flow' only, got {self.shift}")
            if isinstance(self.timesteps, str) and self.timesteps in ("karras", "log_snr"):
                t, alpha, sigma = spaced_levels(schedule, self.timesteps, self.steps, self.final_alpha_cumprod)
            else:
                t = spaced(schedule.T, self.timesteps, self.steps)
                t = one_step_from_the_noisiest(schedule.T, self.timesteps, t)
                alpha, sigma = noise_levels(schedule, t, self.final_alpha_cumprod)
        self._set(steps=len(t), timesteps=self.timesteps if isinstance(self.timesteps, str) else tuple(t.tolist()))
        return t, alpha, sigma

    def _part(self, strength: float) -> tuple[Table, int]:
        left_out = steps_left_out(self.steps, strength, kept_part=self.prediction == "flow", unit="steps")
        row = self._rows_a_step * left_out
        return (self.table_from(row) if row else self.table), row


def schedule_for(prediction: str, model: Model, schedule: Schedule | None) -> Schedule | None:
    """As `schedule_of`, but a flow has none of its own."""
    return schedule if prediction == "flow" else schedule_of(model, schedule)
