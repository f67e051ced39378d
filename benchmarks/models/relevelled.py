"""A model asked at the noise levels of another schedule, between the timesteps of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsample import Schedule


class Relevelled:
    """An epsilon model of `schedule`, by a model that takes fractional t of its own schedule.

    Where both schedules have the same alpha bar, x is the same mixture of sample and noise, and so is epsilon.
    """

    def __init__(self, model: Any, schedule: Schedule) -> None:
        self.schedule, self._model = schedule, model
        ours, theirs = (np.log(one.alphas_cumprod / (1 - one.alphas_cumprod)) for one in (schedule, model.schedule))
        t = np.interp(-ours, -theirs, np.arange(len(theirs)))
        self._times = torch.from_numpy(t).float()

    def __call__(self, x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        output: Tensor = self._model(x, self._times[t.long()], **keywords)
        return output
