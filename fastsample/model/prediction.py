"""What a model states of itself: what it predicts, and with which variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fastsample.model.called_modules import attribute
from fastsample.times.predictions import Prediction


def prediction_of(model: Callable[..., Any], prediction: str | None) -> Prediction:
    """The given prediction, else the model's attribute `prediction` where that is a str, else "epsilon".

    The model's is found as its schedule is: on the model, else on the modules that it calls.
    """
    return cast(Prediction, prediction if prediction is not None else _stated(model, "prediction", "epsilon"))


def variance_of(model: Callable[..., Any], variance: str | None) -> str:
    """The same of a DDPM's variance: given, else the model's attribute `variance`, else "fixed_small"."""
    return variance if variance is not None else _stated(model, "variance", "fixed_small")


def _stated(model: Callable[..., Any], name: str, otherwise: str) -> str:
    found = attribute(model, name, str)
    return found if isinstance(found, str) else otherwise
