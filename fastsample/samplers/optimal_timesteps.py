"""Timesteps for a model, found on its own trajectories (GITS: Chen et al. 2024)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from fastsample import ops
from fastsample.checks import checked_shape, integer
from fastsample.model import Model, Predictor, prediction_of, schedule_of
from fastsample.ops.noise.keys import Seed, fresh_seed
from fastsample.samplers.ddim import DDIM
from fastsample.samplers.euler import Euler
from fastsample.samplers.hints import not_a_sampler
from fastsample.samplers.limits import Clip
from fastsample.samplers.sampler import Sampler
from fastsample.schedule import Float64Array, Schedule
from fastsample.tables import Table
from fastsample.times.automatic import auto_timesteps

_MISPLACED = {"strength", "start_step", "mask", "known", "callback", "decode", "out", "noise"}
LATER = 1.15  # what an error of a later jump counts, next to one of the jump before it


def optimal_timesteps(
    model: Model,
    shape: tuple[int, ...],
    steps: int,
    *,
    sampler: Sampler | None = None,
    schedule: Schedule | None = None,
    clip: Clip = None,
    samples: int = 64,
    fine_steps: int = 60,
    seed: Seed | None = None,
    progress: bool = True,
    **options: Any,
) -> tuple[int | float, ...]:
    """Which timesteps to visit in few steps, for this model: those of the cheapest path along its own trajectories.

    Samples are drawn in many steps. With y = x / alpha and r = sigma / alpha, a jump from level i to level j of them
    costs what Euler's method would miss, the mean of |y_i + (r_j - r_i) epsilon_i - y_j|, and dynamic programming finds
    the path of `steps` jumps from the first level to clean data whose costs c_1 + 1.15 (c_2 + 1.15 (c_3 + ...)) are
    least. For a flow y is x, r is sigma and epsilon is its velocity. It takes samples * fine_steps model calls, once.

    Args:
        model: see fastsample.ddim.
        shape: of one batch of samples, (B, ...), with which options such as cond={"y": labels} go.
        steps: N, how many timesteps are wanted.
        sampler: what draws the samples, without noise and one row a step, and then has `schedule`, `clip` and
            `fine_steps` of its own; the first timestep is one of its. Default fastsample.DDIM, evenly down from where
            "auto" starts N steps, or fastsample.Euler for a flow.
        schedule, clip: see fastsample.ddim.
        samples: how many, in whole batches.
        fine_steps: timesteps among which they are chosen.
        seed: of the samples; default a fresh one.
        progress: show a bar.
        **options: see fastsample.Options: guidance, cond, uncond, model_kwargs, device and so on.

    Returns:
        N timesteps, descending, for `timesteps=` of samplers: whole ones, unless `sampler` visits others.

    Raises:
        ValueError, TypeError: for arguments that cannot work: a sampler that adds noise, has no levels or begins at
            alpha 0 (zero terminal SNR), more steps than it has, and options of which parts of runs are made or states
            changed. ValueError: the model returns what is not finite.

    Example:
        >>> from fastsample import Schedule
        >>> times = optimal_timesteps(
        ...     lambda x, t: 0.1 * x, (8, 3, 8, 8), 5, schedule=Schedule.linear(), samples=8, fine_steps=20, seed=0,
        ...     progress=False,
        ... )
        >>> len(times), times[0]
        (5, 999)
    """
    count = integer("steps", steps, 1)
    shape = checked_shape("shape", shape)
    batches = -(-integer("samples", samples, 1) // shape[0])
    if sampler is None:
        sampler = _fine_sampler(model, schedule, clip, count, integer("fine_steps", fine_steps, 1))
    table = _checked(sampler, count)
    if misplaced := sorted(_MISPLACED & options.keys()):
        raise TypeError(f"optimal_timesteps takes no {', '.join(misplaced)}: whole runs are drawn, from noise")
    seed = fresh_seed() if seed is None else seed
    index = integer("index", options.pop("index", 0), 0)
    costs = np.zeros((len(table), len(table) + 1))
    with tqdm(total=batches * len(table), desc="trajectories", unit=" calls", disable=not progress) as bar:
        for batch in range(batches):
            place = index + batch * shape[0]
            states, slopes = _trajectory(sampler, model, shape, bar, {**options, "seed": seed, "index": place})
            costs += _costs(states, slopes, _ratios(table)) / batches
    if not np.isfinite(costs).all():
        raise ValueError("the model returns NaN or infinity along its trajectories")
    return tuple(table.times[k] for k in cheapest_path(costs, count))


def cheapest_path(costs: Float64Array, jumps: int) -> list[int]:
    """The levels from which so many jumps start, on the cheapest path from level 0 to the last one.

    Args:
        costs: of the jump from level i to level j, (F, F + 1); j > i.
        jumps: at most F.

    Example:
        >>> cheapest_path(np.array([[0, 1.0, 4.0, 9.0], [0, 0, 1.0, 4.0], [0, 0, 0, 1.0]]), 2)
        [0, 2]
    """
    levels = len(costs)
    rest = costs[:, -1].copy()  # of the cheapest path to the end in one jump, two jumps and so on
    ways: list[NDArray[np.int64]] = []
    for _ in range(jumps - 1):
        through = np.where(np.tri(levels, dtype=bool), np.inf, costs[:, :-1] + LATER * rest)
        ways.append(through.argmin(axis=1))
        rest = through.min(axis=1)
    path = [0]
    for way in reversed(ways):
        path.append(int(way[path[-1]]))
    return path


def _fine_sampler(model: Model, schedule: Schedule | None, clip: Clip, steps: int, fine_steps: int) -> Sampler:
    prediction = prediction_of(model, None)
    if prediction == "flow":
        if schedule is not None:
            raise ValueError("schedule is given, and the model is a flow, which has none")
        return Euler(steps=fine_steps, timesteps="trailing", prediction="flow", clip=clip)
    schedule = schedule_of(model, schedule)
    start = auto_timesteps(schedule, steps, prediction)[0]
    fine_steps = min(fine_steps, int(start) + 1)
    even = np.rint((1 - np.arange(fine_steps) / fine_steps) * (start + 1)) - 1
    return DDIM(schedule, timesteps=np.unique(even.astype(np.int64)), prediction=prediction, clip=clip)


def _checked(sampler: Sampler, steps: int) -> Table:
    """The table of a sampler that can draw trajectories for so many steps."""
    if not isinstance(sampler, Sampler):
        raise not_a_sampler(sampler)
    table = sampler.table
    if any(table.stochastic) or table.alpha is None or len(set(table.times)) < len(table):
        raise ValueError("sampler must have noise levels, one row a step and no noise, such as fastsample.DDIM")
    if _scale(table)[0] == 0:
        raise ValueError("sampler begins at pure noise, alpha 0, from where a path has no scale: give it a lower start")
    if steps > len(table):
        raise ValueError(f"steps must be at most {len(table)}, the timesteps that they are chosen from; got {steps}")
    return table


def _trajectory(
    sampler: Sampler, model: Model, shape: tuple[int, ...], bar: Any, options: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """y at every level and dy/dr at every one but the last."""
    table = sampler.table
    assert table.sigma is not None
    device = options.get("device") or Predictor(model).device
    x = ops.randn(shape, seed=options.pop("seed"), index=options.pop("index"), device=device) * table.init_noise_sigma
    scale = _scale(table)
    states, slopes = [x / scale[0]], []
    for k, step in enumerate(sampler.iterate(model, x, **options)):
        slopes.append((states[-1] - step.x0) * float(scale[k] / table.sigma[k]))
        states.append(step.x / scale[k + 1])
        bar.update()
    return states, slopes


def _costs(states: list[Tensor], slopes: list[Tensor], ratios: Float64Array) -> Float64Array:
    """What Euler's method misses from each level to each later one, the mean over samples, (F, F + 1)."""
    after = torch.stack(states)
    costs = np.zeros((len(slopes), len(states)))
    for i, slope in enumerate(slopes):
        steps = torch.from_numpy(ratios[i + 1 :] - ratios[i]).to(slope).reshape(-1, *(1,) * slope.ndim)
        missed = states[i] + steps * slope - after[i + 1 :]
        costs[i, i + 1 :] = missed.reshape(*missed.shape[:2], -1).norm(dim=2).mean(dim=1).double().cpu().numpy()
    return costs


def _scale(table: Table) -> Float64Array:
    """What x is y times at each level: alpha, but 1 for a flow, whose alpha is 1 - sigma."""
    assert table.alpha is not None and table.sigma is not None
    return np.ones_like(table.alpha) if np.allclose(table.alpha, 1 - table.sigma) else table.alpha


def _ratios(table: Table) -> Float64Array:
    """r at each level."""
    assert table.sigma is not None
    ratios: Float64Array = table.sigma / _scale(table)
    return ratios
