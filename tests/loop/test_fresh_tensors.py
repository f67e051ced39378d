"""Runs whose rows make new tensors: what such a run keeps of those before."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from fastsample import DDIM, DPMSolver, Sampler, Schedule, Step

SCHEDULE = Schedule.linear()


@pytest.mark.parametrize("kind", [DDIM, DPMSolver])
def test_no_more_x0_live_than_rows_read(kind: type[Sampler]) -> None:
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
    kind(SCHEDULE, steps=6)(lambda x, t: 0.25 * x.detach(), x, callback=look, decode=decode)
    assert alive == [1, 2, 2, 2, 2, 2, 0]
