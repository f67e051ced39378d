"""What a model predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastsample.model.called_modules import attribute


def prediction_of(model: Callable[..., Any], prediction: str | None) -> str:
    """The given prediction, else the model's attribute `prediction` where that is a str, else "epsilon".

    The model's is found as its schedule is: on the model, else on the modules that it calls.
    """
    if prediction is not None:
        return prediction
    found = attribute(model, "prediction", str)
    return found if isinstance(found, str) else "epsilon"
