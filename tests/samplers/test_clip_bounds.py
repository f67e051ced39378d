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
from fastsample import Batcher, Sampler, Schedule, Table
from support.formula import normal
from support.whole_runs import never

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
        pytest.param((np.zeros(0), np.zeros(0)), ValueError, "not be empty", id="empty"),
        pytest.param(([], 1.0), ValueError, "not be empty", id="empty-list"),
        pytest.param((-1e39, 1e39), ValueError, "finite in float32", id="beyond-float32"),
        pytest.param((-(10**400), 1.0), ValueError, "finite in float32", id="beyond-all-floats"),
        pytest.param((-1.0, [1.0, math.nan]), ValueError, "finite in float32", id="nan"),
        pytest.param((0.0, 1e-60), ValueError, "still differ in float32", id="both-0-in-float32"),
        pytest.param((1.0, [2.0, 1.0 + 1e-12]), ValueError, "still differ in float32", id="one-in-float32"),
        pytest.param(np.stack([LOW, HIGH]), TypeError, r"got ndarray of shape \(2, 7\)", id="two-rows"),
        pytest.param(torch.ones(2, 7), TypeError, r"got Tensor of shape \(2, 7\)", id="two-rows-of-a-tensor"),
        pytest.param((torch.ones(7, device="meta"), 1.0), ValueError, "clip lies on the device 'meta'", id="meta"),
        pytest.param(1e39, ValueError, "finite in float32", id="number-beyond-float32"),
        pytest.param(1e-60, ValueError, "positive and finite in float32", id="number-0-in-float32"),
        pytest.param(math.nan, ValueError, "clip must be positive", id="number-nan"),
        pytest.param(10**400, ValueError, "clip is beyond what a float holds", id="number-beyond-all-floats"),
    ],
)
def test_refused(clip: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastsample.DDIM(SCHEDULE, steps=5, clip=clip)
    with pytest.raises(error, match=message):
        fastsample.nll(model, torch.zeros(SHAPE), schedule=SCHEDULE, steps=5, clip=clip)
    with pytest.raises((TypeError, ValueError), match="box"):
        Table([1, 0], p=1.0, limit=1.0, box=clip)


def test_a_constant_element_is_a_bound() -> None:
    x0 = fastsample.ddim(
        model, SHAPE, schedule=SCHEDULE, steps=3, seed=1, clip=([-1.0] * 6 + [0.25], [1.0] * 6 + [0.25])
    )
    assert (x0[..., -1] == 0.25).all()


def test_bounds_that_do_not_fit_the_samples() -> None:
    for clip in ((-np.ones(5), np.ones(5)), (-np.ones((1, 1, 1)), np.ones((1, 1, 1)))):
        with pytest.raises(ValueError, match=r"clip=\(low, high\) of shape .* does not broadcast"):
            fastsample.ddim(never, SHAPE, schedule=SCHEDULE, steps=3, clip=clip)
        with pytest.raises(ValueError, match=r"clip=\(low, high\) of shape .* does not broadcast"):
            fastsample.nll(never, torch.zeros(SHAPE), schedule=SCHEDULE, steps=3, clip=clip)


@pytest.mark.parametrize("quantile", [1e-60, 0.0, math.nan])
def test_a_quantile_that_float32_makes_0_is_none(quantile: float) -> None:
    with pytest.raises(ValueError, match="quantile must lie in"):
        fastsample.DynamicThreshold(quantile)


@pytest.mark.parametrize("clip", [(-1.0, 0.5), (0.0, 0.0), (-1.0, [1.0, 1.0, 0.5])], ids=str)
def test_likelihoods_need_one_limit(clip: Any) -> None:
    x = normal((2, 3), 1)
    table = fastsample.DDPM(SCHEDULE, steps=5, clip=clip).table
    with pytest.raises(ValueError, match=r"bounds of its own.*clip=None, a number or a pair"):
        fastsample.ops.likelihood(x, x, x, table, 0)
    with pytest.raises(ValueError, match=r"bounds of its own.*clip=None, a number or a pair"):
        fastsample.nll(model, x.clamp(-1, 1), schedule=SCHEDULE, steps=5, clip=clip)


@pytest.mark.parametrize(
    "pair",
    [
        (-0.5, 0.5),
        [-0.5, 0.5],
        (np.float32(-0.5), torch.tensor(0.5)),
        ([-0.5] * 3, 0.5),
        (-torch.full((3,), 0.5), [0.5]),
    ],
    ids=["numbers", "list", "scalars", "array-and-number", "arrays"],
)
def test_a_symmetric_pair_is_a_number_for_likelihoods(pair: Any) -> None:
    x0 = normal((2, 3), 1).clamp(-1, 1)
    want, got = (fastsample.nll(model, x0, schedule=SCHEDULE, steps=5, seed=3, clip=clip) for clip in (0.5, pair))
    assert torch.equal(got.total_bpd, want.total_bpd) and torch.equal(got.x0_mse, want.x0_mse)
    one, other = (fastsample.DDPM(SCHEDULE, steps=5, clip=clip).table for clip in (0.5, pair))
    for row in (0, 4):
        assert torch.equal(*(fastsample.ops.likelihood(x0, 2 * x0, x0, table, row) for table in (one, other)))
