"""What a row costs beside the model, counted and not timed: calls of Python functions between two model calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import DDIM, Sampler, Schedule
from fastsample.ops.backend import cpu_module

SCHEDULE = Schedule.linear()
SHAPE = (1, 4, 4)

pytestmark = pytest.mark.skipif(cpu_module() is None, reason="the reference backend is Python itself")


def model(x: Tensor, t: Tensor) -> Tensor:
    return x


def same(x0: Tensor, t: Tensor) -> Tensor:
    return x0


def calls(run: Callable[[], object]) -> int:
    count = 0

    def on_event(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(on_event)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def calls_per_row(run: Callable[[Sampler], object], **fields: Any) -> float:
    """Those that each of ten more rows takes."""
    samplers = [DDIM(SCHEDULE, steps=steps, **fields) for steps in (5, 15)]
    for sampler in samplers:
        run(sampler)
    few, many = (calls(lambda sampler=sampler: run(sampler)) for sampler in samplers)  # type: ignore[misc]
    return (many - few) / 10


def test_a_row_that_nobody_looks_at_is_the_loop_and_the_model() -> None:
    assert calls_per_row(lambda sampler: sampler(model, SHAPE, seed=1)) == 2


def test_a_row_that_is_looked_at_makes_few_calls_more() -> None:
    def look(step: object) -> None:
        pass

    assert calls_per_row(lambda sampler: sampler(model, SHAPE, seed=1, callback=look)) <= 14


def test_a_row_of_a_generator_makes_few_calls_more() -> None:
    def look(sampler: Sampler) -> None:
        for _ in sampler.iterate(model, SHAPE, seed=1):
            pass

    assert calls_per_row(look) <= 17


def test_a_row_that_corrects_x0_makes_few_calls_more() -> None:
    assert calls_per_row(lambda sampler: sampler(model, SHAPE, seed=1), correct_x0=same) <= 8


def test_a_row_that_paints_makes_few_calls_more() -> None:
    painted = {"mask": torch.ones(SHAPE), "known": torch.zeros(SHAPE)}
    assert calls_per_row(lambda sampler: sampler(model, SHAPE, seed=1, **painted)) <= 15
