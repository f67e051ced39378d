"""The default spacing for a model that is exact next to pure noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastsample.model import target_of
from fastsample.times.automatic import AUTO


def spacing_of(model: Callable[..., Any], prediction: str, timesteps: Any) -> Any:
    """The given timesteps; but "trailing" instead of "auto" for an epsilon model whose network gives v or x0.

    Its error in epsilon shrinks as fast as sigma / alpha grows, so that "auto" has nothing to keep away from.
    """
    automatic = isinstance(timesteps, str) and timesteps == AUTO
    return "trailing" if automatic and prediction == "epsilon" and target_of(model) in ("v", "x0") else timesteps
