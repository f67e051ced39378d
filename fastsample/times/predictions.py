"""What a model's prediction tells at a noise level (alpha, sigma): the clean sample x0 and the noise epsilon."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from fastsample.checks import no_such_name
from fastsample.schedule import Float64Array

Prediction = Literal["epsilon", "v", "x0", "flow"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def x0_coefficients(prediction: str, alpha: Float64Array, sigma: Float64Array) -> tuple[Float64Array, Float64Array]:
    """(p, q) with x0 = p*x + q*m for a model that predicts

    - epsilon: the noise z;
    - v: alpha z - sigma x0, where alpha^2 + sigma^2 = 1 (Salimans & Ho 2022);
    - x0: the clean sample;
    - flow: the velocity z - x0, where alpha + sigma = 1 (flow matching).

    Raises:
        ValueError: for another prediction, and for epsilon where alpha is 0: x0 cannot be told from pure noise.
    """
    if prediction == "epsilon":
        if (alpha == 0).any():
            raise ValueError(
                "prediction='epsilon' cannot work where alpha bar is 0 (zero terminal SNR): leave that timestep out or "
                "use a model that predicts v or x0"
            )
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        if not np.allclose(alpha**2 + sigma**2, 1):
            raise ValueError("prediction='v' needs levels with alpha^2 + sigma^2 = 1, as alpha bars give them")
        return alpha, -sigma
    if prediction == "x0":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "flow":
        if not np.allclose(alpha + sigma, 1):
            raise ValueError("prediction='flow' needs levels with alpha + sigma = 1: use fastsample.euler")
        return np.ones_like(alpha), -sigma
    raise no_such_name("prediction", prediction, PREDICTIONS)


def epsilon_coefficients(
    prediction: str, alpha: Float64Array, sigma: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """(r, u) with epsilon = r*x + u*m, the direction that the model's own output implies, before x0 is limited.

    Raises:
        ValueError: for x0 prediction where sigma is 0: clean data do not tell the noise.
    """
    if prediction == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "v":
        return sigma, alpha
    if prediction == "flow":
        return np.ones_like(alpha), alpha
    return rederived_epsilon_coefficients(alpha, sigma)


def rederived_epsilon_coefficients(alpha: Float64Array, sigma: Float64Array) -> tuple[Float64Array, Float64Array]:
    """(r, w) with epsilon = r*x + w*x0, the direction that a limited or corrected x0 implies.

    Raises:
        ValueError: where sigma is 0.
    """
    if (sigma == 0).any():
        raise ValueError("epsilon cannot be derived from x0 where alpha bar is 1: leave that timestep out")
    return 1 / sigma, -alpha / sigma
