"""The columns that samplers share: x0 from what a model predicts, and steps along the direction of epsilon."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from fastsample.samplers.limits import Clip, limit_columns
from fastsample.schedule import Float64Array
from fastsample.tables import Table
from fastsample.times.predictions import epsilon_coefficients, rederived_epsilon_coefficients, x0_coefficients


def x0_table(
    t: NDArray[Any], alpha: Float64Array, sigma: Float64Array, *, prediction: str, clip: Clip, **columns: Any
) -> Table:
    """The table of these columns, in whose rows x0 is what the model's output tells at their level, limited by clip.

    Args:
        t: times for the model, shape (N,).
        alpha, sigma: noise levels, shape (N + 1,), before each row and after the last.

    Raises:
        ValueError: for a clip that is not positive, and a prediction that cannot work at one of the levels.
    """
    p, q = x0_coefficients(prediction, alpha[:-1], sigma[:-1])
    return Table(t, p=p, q=q, **columns, **limit_columns(clip), alpha=alpha, sigma=sigma)


def direction_table(
    t: NDArray[Any],
    alpha: Float64Array,
    sigma: Float64Array,
    direction: Float64Array,
    s: Float64Array | float,
    *,
    prediction: str,
    clip: Clip,
    rederive_epsilon: bool,
) -> Table:
    """The rows x' = alpha' x0 + direction epsilon + s z, with epsilon from the limited x0 or the model's own.

    `direction` and `s` have shape (N,); the other arguments and the errors are those of `x0_table`.
    """
    p, q = x0_coefficients(prediction, alpha[:-1], sigma[:-1])
    if rederive_epsilon:
        of_x, of_x0 = rederived_epsilon_coefficients(alpha[:-1], sigma[:-1])
        columns: dict[str, Any] = {"a": direction * of_x, "b": alpha[1:] + direction * of_x0}
    else:
        of_x, of_m = epsilon_coefficients(prediction, alpha[:-1], sigma[:-1])
        columns = {"a": direction * of_x, "b": alpha[1:], "d": direction * of_m}
    return Table(t, p=p, q=q, s=s, **columns, **limit_columns(clip), alpha=alpha, sigma=sigma)
