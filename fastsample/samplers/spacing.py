"""What a model says of itself: its prediction, and whether a run of it may start at the last timestep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastsample.model import attribute, target_of
from fastsample.times.automatic import AUTO


def prediction_and_spacing(
    model: Callable[..., Any], prediction: str | None, timesteps: Any, *, amplifies_x0: bool = False
) -> tuple[str, Any]:
    """The prediction, given or the model's, else "epsilon"; and the timesteps, "trailing" instead of some "auto".

    That is for an epsilon model whose network gives v or x0. Its error in epsilon shrinks as fast as sigma / alpha
    grows, so that "auto" has nothing to keep away from, unless the sampler amplifies errors in x0. Only models that
    state a prediction are asked what their network gives: a look costs some microseconds.
    """
    if prediction is None:
        prediction = attribute(model, "prediction", str)
        if not isinstance(prediction, str):
            return "epsilon", timesteps
    if amplifies_x0 or prediction != "epsilon" or not isinstance(timesteps, str) or timesteps != AUTO:
        return prediction, timesteps
    return prediction, "trailing" if target_of(model) in ("v", "x0") else timesteps
