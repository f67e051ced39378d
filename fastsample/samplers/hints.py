"""Messages for calls that are likely mistakes: unknown arguments, rows that amplify errors, starts without noise."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastsample.caller import warn
from fastsample.loop.options import Options
from fastsample.schedule import Schedule
from fastsample.tables import Table
from fastsample.times.automatic import AUTO

# Four steps from half of it have several times the Frechet distance of the best start, on the cosine and on the linear
# schedule: benchmarks/starts.py.
LEAST_RATIO = 5.0

# The names in diffusers of some arguments, and the names here.
_OTHER_NAMES = {
    "guidance_scale": "guidance=",
    "num_inference_steps": "steps=",
    "generator": "seed= or noise=",
    "y": "model_kwargs={'y': ...} or cond=",
    "encoder_hidden_states": "model_kwargs={'encoder_hidden_states': ...} or cond=",
}


def no_argument(sampler: str, name: str, attributes: Mapping[str, Any]) -> str:
    """The message for an argument that a run does not have; `attributes` are the sampler's."""
    if name in attributes:
        return f"{name} belongs to {sampler}(..., {name}=), not to its call"
    near = difflib.get_close_matches(name, [*Options.__annotations__, *attributes], n=1)
    hint = _OTHER_NAMES.get(name) or (f"{near[0]}=" if near else "")
    meant = f"; did you mean {hint}?" if hint else ": the model's own keywords go into model_kwargs="
    return f"{sampler} has no argument {name}{meant} (fastsample.Options lists what a call takes)"


def warn_of_amplified_errors(table: Table) -> bool:
    """Warns where a row would multiply a small error of the model by much; returns whether it warned."""
    # A limit keeps what the error does to x0 to the order of 1, but not what the row makes of that (a Heun corrector
    # next to pure noise).
    unlimited = np.isinf(table.limit) & (table.quantile == 0)
    limited = np.abs(table.b) * np.minimum(np.abs(table.q), 1)
    grows = np.where(unlimited, np.abs(table.b * table.q + table.d) / 20, limited / 5)
    worst = int(np.argmax(grows))
    if grows[worst] <= 1:
        return False
    if unlimited[worst]:
        factor, remedy = 20 * grows[worst], "give clip= (1.0 for images in [-1, 1]), or leave that timestep out"
    else:
        factor, remedy = 5 * grows[worst], "leave that timestep out, or for heun take timesteps='karras'"
    warn(f"the row at t = {table.times[worst]} multiplies the model's error by {factor:.0f}: {remedy}")
    return True


def low_start(table: Table, schedule: Schedule | None, timesteps: object) -> str | None:
    """What to tell of a run from drawn noise whose first level holds much of the sample, None for any other.

    x_T ~ N(0, 1) lacks that share, alpha x0. Where even the schedule's noisiest level is like that nothing can be
    chosen, and of one with more sample than noise fastsample.loop.start warns for every table. The default goes as high
    as it can.
    """
    if table.alpha is None or table.sigma is None or timesteps == AUTO:
        return None
    alpha, sigma = float(table.alpha[0]), float(table.sigma[0])
    if sigma < alpha or sigma >= LEAST_RATIO * alpha:
        return None
    least = 0.0 if schedule is None else float(schedule.alphas_cumprod[-1])
    if least > 0 and (1 - least) / least < (1.5 * sigma / alpha) ** 2:
        return None
    return (
        f"x_T is drawn as pure noise, but the first row (t = {table.times[0]:g}) takes a state at the level alpha = "
        f"{alpha:.3g}, sigma = {sigma:.3g}, whose share of the sample it lacks: take timesteps='auto' or a noisier "
        "first timestep, or give as x a clean sample with strength="
    )
