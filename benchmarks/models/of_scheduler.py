"""A model that predicts what a live scheduler asks for, for bent Gaussian data at the noise levels of its schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Level = tuple[Tensor, Tensor]


class OfScheduler:
    """model(x, t), in x's own dtype, so that runs in float32 and in float64 are of one function.

    Args:
        scheduler: what it predicts, and alpha bar at its timesteps.
        learned: whether a second half is returned, the variance's.
    """

    def __init__(self, scheduler: Any, learned: bool = False) -> None:
        self.prediction = scheduler.config.get("prediction_type", "flow_prediction")
        continuous = scheduler.config.get("timestep_type") == "continuous"
        self.continuous = continuous and self.prediction == "v_prediction"
        self.alpha_bar = getattr(scheduler, "alphas_cumprod", None)
        self.learned = learned

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (level.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) for level in self.level(t))
        variance = alpha**2 / 4 + sigma**2
        of_x: Mapping[str, Tensor] = {
            "epsilon": sigma / variance,
            "v_prediction": 0.75 * alpha * sigma / variance,
            "flow_prediction": (sigma - alpha / 4) / variance,
        }
        bent = 0.1 * torch.sin(3 * x) * (alpha if self.prediction == "epsilon" else 1.0)
        output = of_x.get(self.prediction, alpha / 4 / variance) * x + bent
        return torch.cat([output, torch.sin(2 * x)], dim=1) if self.learned else output

    def level(self, t: Tensor) -> Level:
        """(alpha, sigma) at these times, float64."""
        if self.prediction == "flow_prediction" or self.alpha_bar is None:
            sigma = t.double() / 1000
            return 1 - sigma, sigma
        if self.continuous:  # t is log(sigma / alpha) / 4
            ratio = (4 * t.double()).exp()
            return 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
        alpha_bar = self.alpha_bar.double()[t.long().clamp(0, len(self.alpha_bar) - 1)]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def times_of_sigmas(x: Tensor, t: Tensor) -> Tensor:
    """A model for consistency models' times, 250 ln sigma."""
    return 0.6 * torch.tanh(x) + 0.2 * torch.sin(0.013 * t.to(x.dtype)).view(-1, *[1] * (x.ndim - 1))
