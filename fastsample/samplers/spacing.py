"""What a model says of itself: its prediction, and whether its error in epsilon stays small next to pure noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fastsample.model import attribute, target_of
from fastsample.times.automatic import AUTO


class Spacing(NamedTuple):
    """How a model is to be sampled.

    Attributes:
        prediction: given or the model's, else "epsilon".
        timesteps: "trailing" instead of "auto" where the model is exact.
        exact: whether this is an epsilon model whose network gives v or x0. Its error in epsilon shrinks as fast as
            sigma / alpha grows, so that there is nothing to keep away from or to warn of.
    """

    prediction: str
    timesteps: Any
    exact: bool


def spacing_of(
    model: Callable[..., Any], prediction: str | None, timesteps: Any, *, amplifies_x0: bool = False
) -> Spacing:
    """How a sampler with these arguments goes through a model.

    Only models that state a prediction are asked what their network gives: a look costs some microseconds.

    Args:
        amplifies_x0: whether the sampler multiplies errors in x0 too; no model is exact enough for that.
    """
    if prediction is None:
        prediction = attribute(model, "prediction", str)
        if not isinstance(prediction, str):
            return Spacing("epsilon", timesteps, False)
    if amplifies_x0 or prediction != "epsilon" or target_of(model) not in ("v", "x0"):
        return Spacing(prediction, timesteps, False)
    automatic = isinstance(timesteps, str) and timesteps == AUTO
    return Spacing(prediction, "trailing" if automatic else timesteps, True)
