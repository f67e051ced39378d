"""What a sampler of a scheduler says of itself: its class, the scheduler, and the times that it visits."""

from __future__ import annotations

import dataclasses
from typing import Any

from numpy.typing import NDArray

from fastsample.samplers.sampler import Sampler
from fastsample.tables import Table

_SHOWN = ("steps", "prediction", "timesteps")
_HIDDEN = {
    *_SHOWN,
    "schedule",
    "visited",
    "quiet",
    "shift",
    "final_alpha_cumprod",
    "init_noise_sigma",
}  # that is in them
_MOST = 12  # times that are all shown


class OfScheduler(Sampler):
    """A sampler that was read off a scheduler of diffusers.

    Attributes:
        scheduler: the name of its class; "" where it is not known.
        steps: how many times are visited.
        timesteps: these times, as the scheduler has them.
        prediction: what the model predicts.
    """

    scheduler: str = ""

    def __repr__(self) -> str:
        shown = [f"{name}={_shown(vars(self)[name])}" for name in _SHOWN if name in vars(self)]
        if dataclasses.is_dataclass(self):
            own = (one for one in dataclasses.fields(self) if one.name not in _HIDDEN)
            shown += [f"{one.name}={value!r}" for one in own if (value := getattr(self, one.name)) != one.default]
        of = f" of {self.scheduler}" if self.scheduler else ""
        return f"{type(self).__name__}({', '.join(shown)}){of}"


class RowsOfScheduler(OfScheduler):
    """One whose rows no other sampler has.

    Args:
        t: the scheduler's timesteps.
        prediction: what the model predicts; None where that has no name here.
    """

    def __init__(self, table: Table, t: NDArray[Any], prediction: str | None = None) -> None:
        super().__init__(table)
        told = {} if prediction is None else {"prediction": prediction}
        self._set(steps=len(t), timesteps=tuple(t.tolist()), **told)


def _shown(value: Any) -> str:
    if not isinstance(value, tuple) or len(value) <= _MOST:
        return repr(value)
    return f"({', '.join(map(repr, value[:3]))}, ..., {value[-1]!r})"
