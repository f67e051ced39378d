"""Whole loops of drop-in schedulers against diffusers': a sample of what `python -m benchmarks.schedulers` runs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from benchmarks.cases.drop_ins import GRIDS, Grid, Run
from benchmarks.schedulers import MOST, difference, explained, made, runs_of

MOST_STEPS = 20


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Without diffusers' word on each timestep that a consistency model was not distilled at."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def values(run: Run) -> list[str]:
    given = {**run.options, **run.timesteps, **run.given, "compat": run.compat}
    return [f"{name}={value!r}" for name, value in given.items()]


def sample(grids: Sequence[Grid]) -> list[Run]:
    """Runs that have each two values of two options together at least once."""
    seen: set[tuple[str, str]] = set()
    chosen = []
    for run in runs_of(grids, MOST_STEPS):
        pairs = set(itertools.combinations(values(run), 2))
        if pairs - seen:
            seen |= pairs
            chosen.append(run)
    return chosen


@pytest.mark.filterwarnings("ignore:.algorithm_types dpmsolver:FutureWarning")
@pytest.mark.parametrize("scheduler", GRIDS)
def test_equals_diffusers_and_draws_the_same_noise(scheduler: str) -> None:
    runs = sample(GRIDS[scheduler])
    beyond = [run for run in runs if not difference(run) <= MOST]
    # A float32 loop from pure noise can lose more; then float64 tells rounding from another formula.
    mistaken = [run.name for run in beyond if not explained(run).is_rounding]
    assert not mistaken and len(beyond) < len(runs) / 3


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_all_timesteps(eta: float) -> None:
    run = Run("DDIMScheduler", {"beta_schedule": "scaled_linear"}, {"num_inference_steps": 1000}, {"eta": eta})
    assert difference(run) <= MOST or explained(run).is_rounding


@pytest.mark.parametrize("scheduler", GRIDS)
def test_other_levels_are_further_off(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the comparison can fail: the drop-in's levels are a thousandth smaller."""
    run = next(run for run in runs_of(GRIDS[scheduler], MOST_STEPS) if run.steps == 4)

    def other(run: Run, drop_in: bool) -> Any:
        scheduler = made(run, drop_in)
        for name in {"alphas_cumprod", "sigmas"} & set(vars(scheduler)) if drop_in else ():
            setattr(scheduler, name, getattr(scheduler, name) * 0.999)
        return scheduler

    monkeypatch.setattr("benchmarks.schedulers.made", other)
    assert difference(run) > MOST
