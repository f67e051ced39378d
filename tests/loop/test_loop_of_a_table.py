"""The loop as whoever stands above it finds it: made from a table, without a sampler."""

from __future__ import annotations

from typing import get_type_hints

import pytest
import torch
from torch import Tensor

from fastsample import DDIM, Options, Schedule
from fastsample.loop.loop import Loop
from fastsample.loop.options import RunOptions
from fastsample.samplers.sampler import loop_of, options_of

SHAPE = (2, 3, 4)
SAMPLER = DDIM(Schedule.linear(), steps=4, eta=1.0)


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.25 * x


def run(loop: Loop, x: Tensor | tuple[int, ...], seed: int) -> Tensor:
    loop.start(x, seed, 0)
    for _ in loop.rows():
        pass
    return loop.result()


def test_what_travels_are_the_options_of_every_sampler() -> None:
    assert get_type_hints(RunOptions) == get_type_hints(Options)


def test_a_table_is_enough() -> None:
    loop = Loop(lambda *_: (SAMPLER.table, 0), None, model, SHAPE, RunOptions())
    for seed in (1, 2, 1):
        assert torch.equal(run(loop, SHAPE, seed), SAMPLER(model, SHAPE, seed=seed))


def test_a_run_begins_at_the_row_that_it_is_told() -> None:
    x = torch.linspace(-1, 1, 24).reshape(SHAPE)
    loop = Loop(lambda *_: (SAMPLER.table, 2), None, model, x, RunOptions())
    assert [visit[0] for visit in loop.schedule] == [2, 3]
    assert torch.equal(run(loop, x, 3), SAMPLER(model, x, seed=3, start_step=2))


def test_strength_tells_the_loop_that_x_is_clean() -> None:
    x = torch.linspace(-1, 1, 24).reshape(SHAPE)
    loop = Loop(lambda *_: (SAMPLER.table, 2), None, model, x, RunOptions(strength=0.5))
    assert torch.equal(run(loop, x, 3), SAMPLER(model, x, seed=3, strength=0.5))


@pytest.mark.parametrize("options", [{}, {"start_step": 1}, {"strength": 0.25}])
def test_a_samplers_loop_runs_its_table(options: dict) -> None:
    x = torch.linspace(-1, 1, 24).reshape(SHAPE)
    loop = loop_of(SAMPLER, model, x, options_of(SAMPLER, model, x, options))
    assert torch.equal(run(loop, x, 5), SAMPLER(model, x, seed=5, **options))
