"""clip=(low, high): samplers whose x0 has bounds for each of its elements, such as a robot's actions."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample
from fastsample import Batcher, Sampler, Schedule
from support.formula import normal

SCHEDULE = Schedule.linear(100)
SHAPE = (2, 16, 7)
LOW, HIGH = np.linspace(-0.9, -0.1, 7), np.linspace(0.05, 0.6, 7)
SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddim": fastsample.DDIM,
    "ddpm": fastsample.DDPM,
    "dpm-solver": fastsample.DPMSolver,
    "unipc": fastsample.UniPC,
    "ipndm": fastsample.IPNDM,
    "heun": fastsample.Heun,
    "euler-ancestral": fastsample.EulerAncestral,
    "lcm": fastsample.LCM,
}


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.3 * x + 0.1 * torch.sin(3 * x)


def clamped(x0: Tensor, t: Tensor) -> Tensor:
    return x0.clamp(torch.from_numpy(LOW).to(x0), torch.from_numpy(HIGH).to(x0))


@pytest.mark.parametrize("name", SAMPLERS)
def test_is_a_correction_by_the_same_bounds(name: str) -> None:
    make = SAMPLERS[name]
    got = make(SCHEDULE, steps=5, clip=(LOW, HIGH))(model, SHAPE, seed=1)
    want = make(SCHEDULE, steps=5, correct_x0=clamped)(model, SHAPE, seed=1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_the_last_x0_is_inside() -> None:
    x0 = fastsample.ddim(model, SHAPE, schedule=SCHEDULE, steps=4, seed=1, clip=(LOW, HIGH))
    low, high = torch.from_numpy(LOW).float(), torch.from_numpy(HIGH).float()
    assert (x0 >= low - 1e-6).all() and (x0 <= high + 1e-6).all()
    assert (x0 <= low + 1e-6).any() and (x0 >= high - 1e-6).any()


@pytest.mark.parametrize(
    ("clip", "shape"),
    [
        pytest.param((-0.5, 0.2), (2, 3, 5, 5), id="two-numbers"),
        pytest.param((torch.full((3, 1, 1), -0.5), torch.full((3, 1, 1), 0.2)), (2, 3, 5, 5), id="channels"),
        pytest.param(([-0.5] * 7, 0.2), SHAPE, id="list-and-number"),
    ],
)
def test_what_bounds_may_be(clip: Any, shape: tuple[int, ...]) -> None:
    x0 = fastsample.ddim(model, shape, schedule=SCHEDULE, steps=4, seed=1, clip=clip)
    assert x0.min() >= -0.5 - 1e-6 and x0.max() <= 0.2 + 1e-6


def test_ways_to_run() -> None:
    sampler = fastsample.DDIM(SCHEDULE, steps=5, eta=1.0, clip=(LOW, HIGH))
    want = sampler(model, SHAPE, seed=1)
    assert torch.equal(sampler.prepare(model, SHAPE)(seed=1), want)
    *_, last = sampler.iterate(model, SHAPE, seed=1)
    assert torch.equal(last.x, want)
    batcher = Batcher(model, sampler, batch=3)
    requests = [batcher.submit(SHAPE[1:], seed=1, index=i) for i in range(2)]
    while batcher.step():
        pass
    for one, request in zip(want, requests, strict=True):
        torch.testing.assert_close(request.result(), one, rtol=1e-5, atol=1e-5)
    x = normal(SHAPE, 3).requires_grad_()
    followed = fastsample.DDIM(SCHEDULE, steps=3, clip=(LOW, HIGH))(model, x)
    (gradient,) = torch.autograd.grad(followed.sum(), x)
    assert gradient.isfinite().all()


def test_samplers_with_bounds_are_compared_hashed_and_pickled() -> None:
    one, same = (fastsample.DDIM(SCHEDULE, steps=5, clip=(LOW, torch.from_numpy(HIGH))) for _ in range(2))
    other = fastsample.DDIM(SCHEDULE, steps=5, clip=(LOW, HIGH + 0.1))
    assert one == same and hash(one) == hash(same) and one != other and one.table != other.table
    assert pickle.loads(pickle.dumps(one)) == one and pickle.loads(pickle.dumps(one.table)) == one.table


@pytest.mark.parametrize(
    ("clip", "error", "message"),
    [
        pytest.param((0.5, -0.5), ValueError, "low <= high", id="upside-down"),
        pytest.param((-1.0, math.inf), ValueError, "finite", id="infinite"),
        pytest.param((-1.0, 0.0, 1.0), ValueError, r"clip must be \(low, high\)", id="three"),
        pytest.param(([-1.0] * 3, [1.0] * 4), ValueError, "of one shape", id="two-shapes"),
        pytest.param(("a", 1.0), TypeError, "clip", id="text"),
        pytest.param(True, TypeError, "clip must be a number", id="bool"),
    ],
)
def test_refused(clip: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastsample.DDIM(SCHEDULE, steps=5, clip=clip)


def test_likelihoods_need_one_limit() -> None:
    x = normal((2, 3), 1)
    table = fastsample.DDPM(SCHEDULE, steps=5, clip=(-1.0, 0.5)).table
    with pytest.raises(ValueError, match="bounds of its own"):
        fastsample.ops.likelihood(x, x, x, table, 0)
