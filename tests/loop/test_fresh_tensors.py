"""Runs whose rows make new tensors: what such a run keeps of those before."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from fastsample import DDIM, DPMSolver, Sampler, Schedule, Step, Table
from support.batcher_runs import HandMade

SCHEDULE = Schedule.linear()
TWO = {"c1": [0, 1, 1, 1, 1, 1], "c2": [0, 0, 1, 1, 1, 1]}
THREE = {**TWO, "c3": [0, 0, 0, 1, 1, 1]}
SAMPLERS = {
    "none": DDIM(SCHEDULE, steps=6),
    "one": DPMSolver(SCHEDULE, steps=6),
    "two": HandMade(Table(range(6), q=1.0, **TWO)),
    "three": HandMade(Table(range(6), q=1.0, **THREE)),
    "three-that-are-not-x0": HandMade(Table(range(6), q=1.0, hx=0.5, **THREE)),
}


@pytest.mark.parametrize(
    ("name", "most"), [("none", 1), ("one", 1), ("two", 2), ("three", 3), ("three-that-are-not-x0", 1)]
)
def test_no_more_x0_live_than_rows_read(name: str, most: int) -> None:
    sampler: Sampler = SAMPLERS[name]
    seen: list[weakref.ref[Tensor]] = []
    alive = []

    def count() -> int:
        return sum(reference() is not None for reference in seen)

    def look(step: Step) -> None:
        seen.append(weakref.ref(step.x0))
        alive.append(count())

    def decode(x: Tensor) -> Tensor:
        alive.append(count())
        return x

    x = torch.ones(1, 3, requires_grad=True)
    sampler(lambda x, t: 0.25 * x.detach(), x, callback=look, decode=decode)
    assert alive == [*(min(row, most) for row in range(1, 7)), 0]
