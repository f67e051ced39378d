"""Timesteps found on a model's trajectories: the cheapest path is found, and it is a better one."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample
from fastsample import DDIM, DDPM, Heun, Schedule, optimal_timesteps
from fastsample.samplers.optimal_timesteps import LATER, cheapest_path
from support.chains import toy_model

SCHEDULE = Schedule.linear()
SHAPE = (8, 1, 4, 4)
V = "v"
QUIET: dict[str, Any] = {"progress": False, "seed": 3}


@pytest.mark.parametrize("jumps", [1, 2, 3, 5, 8])
def test_the_path_is_the_cheapest_of_all(jumps: int) -> None:
    levels = 8
    costs = np.random.default_rng(jumps).random((levels, levels + 1)) ** 3

    def cost(path: tuple[int, ...]) -> float:
        ends = (*path[1:], levels)
        return sum(LATER**n * costs[i, j] for n, (i, j) in enumerate(zip(path, ends, strict=True)))

    every = [(0, *rest) for rest in combinations(range(1, levels), jumps - 1)]
    assert tuple(cheapest_path(costs, jumps)) == min(every, key=cost)


def bent(x: Tensor, t: Tensor) -> Tensor:
    """Epsilon that turns around t = 300 and is straight elsewhere."""
    return torch.tanh((t.reshape(-1, 1, 1, 1) - 300) / 20).expand_as(x).to(x.dtype)


def test_steps_lie_where_trajectories_bend() -> None:
    times = optimal_timesteps(bent, SHAPE, 6, schedule=SCHEDULE, samples=8, **QUIET)
    assert len(times) == 6 and times == tuple(sorted(times, reverse=True))
    assert sum(200 <= t <= 400 for t in times) >= 3


def test_they_are_better_than_even_ones() -> None:
    x = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    times = optimal_timesteps(bent, SHAPE, 6, schedule=SCHEDULE, samples=8, **QUIET)
    want = DDIM(SCHEDULE, steps=500)(bent, x)
    even, found = (DDIM(SCHEDULE, **spacing)(bent, x) for spacing in ({"steps": 6}, {"timesteps": times}))
    assert (found - want).square().mean() < 0.5 * (even - want).square().mean()


def test_samples_do_not_depend_on_the_batch_and_a_seed_names_them() -> None:
    one = optimal_timesteps(toy_model, (12, 1, 4, 4), 5, schedule=SCHEDULE, samples=12, fine_steps=20, **QUIET)
    parts = optimal_timesteps(toy_model, (4, 1, 4, 4), 5, schedule=SCHEDULE, samples=12, fine_steps=20, **QUIET)
    assert one == parts


def test_options_reach_the_model() -> None:
    seen: list[tuple[int, ...]] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(tuple(y.shape))
        return toy_model(x, t)

    y = torch.zeros(4, 3)
    options: dict[str, Any] = {"guidance": 2.0, "cond": {"y": y}, "uncond": {"y": y}}
    optimal_timesteps(model, (4, 1, 4, 4), 3, schedule=SCHEDULE, samples=8, fine_steps=5, **options, **QUIET)
    assert seen == [(8, 3)] * 10


def test_a_flow() -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return bent(x, t)

    velocity.prediction = "flow"  # type: ignore[attr-defined]
    times = optimal_timesteps(velocity, SHAPE, 5, samples=8, fine_steps=40, **QUIET)
    assert times[0] == 1000 and sum(200 <= t <= 400 for t in times) >= 2
    assert fastsample.euler(velocity, SHAPE, timesteps=times).shape == SHAPE


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"steps": 0}, ValueError, "steps", id="no-steps"),
        pytest.param({"steps": 61}, ValueError, "steps must be at most 60", id="too-many"),
        pytest.param({"samples": 0}, ValueError, "samples", id="no-samples"),
        pytest.param({"sampler": DDPM(SCHEDULE, steps=20)}, ValueError, "sampler must have", id="noise"),
        pytest.param({"sampler": Heun(SCHEDULE, steps=20)}, ValueError, "sampler must have", id="two-rows-a-step"),
        pytest.param({"sampler": "ddim"}, TypeError, "sampler must be one of fastsample's", id="a-name"),
        pytest.param({"shape": (0, 3)}, ValueError, "shape", id="empty"),
        pytest.param({"strength": 0.5}, TypeError, "takes no strength", id="a-part-of-a-run"),
        pytest.param({"index": [0, 1]}, TypeError, "index", id="places"),
        pytest.param(
            {"schedule": SCHEDULE.rescale_zero_terminal_snr(), "sampler": None, "model": V},
            ValueError,
            "begins at pure noise",
            id="zero-terminal-snr",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"shape": SHAPE, "steps": 5, "schedule": SCHEDULE, **arguments}
    given.pop("model", None)

    def model(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("nothing is computed before")

    model.prediction = arguments.get("model", "epsilon")  # type: ignore[attr-defined]
    with pytest.raises(error, match=message):
        optimal_timesteps(model, **given, **QUIET)


def test_a_model_of_nan_is_told() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        optimal_timesteps(lambda x, t: x * float("nan"), SHAPE, 4, schedule=SCHEDULE, samples=8, **QUIET)


def test_a_schedule_of_few_timesteps() -> None:
    assert len(optimal_timesteps(toy_model, (8,), 4, schedule=Schedule.linear(10), samples=8, **QUIET)) == 4
