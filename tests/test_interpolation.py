"""slerp and interpolation between noises."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fastsample import DDIM, Schedule, ddim, ops
from fastsample.interpolation import interpolate, slerp
from fastsample.samplers.ddpm import DDPM
from support.chains import toy_model


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return math.acos(float(a @ b / (a.norm() * b.norm())))


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_the_formula_of_ermongroup(weight: float) -> None:
    a, b = ops.randn((1, 3, 8, 8), seed=1), ops.randn((1, 3, 8, 8), seed=2)
    theta = angle(a, b)
    want = (math.sin((1 - weight) * theta) * a.double() + math.sin(weight * theta) * b.double()) / math.sin(theta)
    # Two products and a sum in float32.
    assert (slerp(a, b, weight) - want).abs().max() <= 3 * 2**-24 * want.abs().max()


def test_it_stays_on_the_sphere_and_moves_evenly() -> None:
    a = torch.nn.functional.normalize(ops.randn((1, 500), seed=1))
    b = torch.nn.functional.normalize(ops.randn((1, 500), seed=2))
    path = slerp(a, b, torch.linspace(0, 1, 9))
    assert path.shape == (9, 500)
    assert (path.norm(dim=1) - 1).abs().max() < 1e-6
    steps = [angle(one, other) for one, other in pairwise(path)]
    np.testing.assert_allclose(steps, angle(a, b) / 8, rtol=1e-4)


def test_every_sample_has_its_own_angle_and_weight() -> None:
    a, b = ops.randn((3, 2, 5), seed=1), ops.randn((3, 2, 5), seed=7)
    weights = [0.1, 0.5, 0.9]
    together = slerp(a, b, torch.tensor(weights, dtype=torch.float64))
    for i, weight in enumerate(weights):
        assert torch.equal(together[i : i + 1], slerp(a[i : i + 1], b[i : i + 1], weight))
    assert torch.equal(slerp(a, b, weights), together)
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)


def test_parallel_directions_are_joined_straight() -> None:
    a = ops.randn((1, 50), seed=1)
    for b in (a, 3 * a, a * (1 + 1e-7)):
        torch.testing.assert_close(slerp(a, b, 0.25), 0.75 * a + 0.25 * b, rtol=1e-6, atol=1e-6)
    # No arc leads to the opposite point rather than another.
    assert slerp(a, -a, 0.5).abs().max() < 1e-6
    assert slerp(torch.zeros(1, 4), torch.ones(1, 4), 0.5).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    a, b = ops.randn((1, 50), seed=1).to(dtype), ops.randn((1, 50), seed=2).to(dtype)
    got = slerp(a, b, 0.3)
    assert got.dtype == dtype
    exact = slerp(a.double(), b.double(), 0.3)
    assert (got - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(
    ("a", "b", "weight", "error", "message"),
    [
        pytest.param(torch.ones(1, 3), torch.ones(1, 4), 0.5, ValueError, "one shape", id="shapes"),
        pytest.param(torch.tensor(1.0), torch.tensor(1.0), 0.5, ValueError, "one shape", id="no-axes"),
        pytest.param(torch.ones(2, 3), torch.ones(2, 3), [0.1] * 3, ValueError, "a number or 2", id="weights"),
        pytest.param(torch.ones(1, 3), torch.ones(1, 3), torch.ones(2, 2), ValueError, "weight", id="weight-shape"),
        pytest.param(torch.ones(1, 3).int(), torch.ones(1, 3), 0.5, TypeError, "a must be a floating", id="dtype"),
        pytest.param(torch.ones(1, 3), [1.0], 0.5, TypeError, "b must be a floating", id="list"),
        pytest.param(torch.ones(1, 3), torch.ones(1, 3).half(), 0.5, TypeError, "a and b must have one", id="dtypes"),
        pytest.param(torch.ones(1, 3), torch.ones(1, 3, device="meta"), 0.5, ValueError, "one device", id="devices"),
        pytest.param(torch.ones(1, 3), torch.ones(1, 3), "half", TypeError, "weight must be a number", id="text"),
        pytest.param(torch.ones(1, 3), torch.ones(1, 3), None, TypeError, "weight must be a number", id="none"),
    ],
)
def test_slerp_refuses(a: Any, b: Any, weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        slerp(a, b, weight)


def test_interpolation_starts_and_ends_at_the_two_samples(backend: str) -> None:
    a, b = ops.randn((1, 3, 4), seed=1), ops.randn((1, 3, 4), seed=2)
    got = interpolate(toy_model, a, b, 5, backend=backend)
    assert got.shape == (5, 3, 4)
    sampled = [ddim(toy_model, one, backend=backend) for one in (a, slerp(a, b, 0.5), b)]
    assert (got[[0, 2, 4]] - torch.cat(sampled)).abs().max() <= 1e-6, "the default is DDIM of 50 steps"
    between = (got[1:] - got[:-1]).flatten(1).norm(dim=1)
    assert between.max() < 2 * between.min(), "the way is smooth"


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (5,), ()], ids=str)
def test_what_lacks_its_batch_axis_is_refused(shape: tuple[int, ...]) -> None:
    one, other = torch.zeros(1, *shape), torch.ones(shape)
    for name, pair in (("a", (other, one)), ("b", (one, other))):
        with pytest.raises(ValueError, match=rf"{name} must be one sample with its batch axis.*{name}\[None\]"):
            interpolate(toy_model, *pair, 3)


def test_a_single_channel_keeps_its_axis() -> None:
    """Whatever the sizes, the first axis is the batch."""
    a, b = ops.randn((1, 1, 4, 1), seed=1), ops.randn((1, 1, 4, 1), seed=2)
    got = interpolate(toy_model, a, b, 3)
    assert got.shape == (3, 1, 4, 1)
    wide = [one.expand(1, 2, 4, 1) for one in (a, b)]
    # The angle between repeated samples is the same, and the model works element by element.
    assert (interpolate(toy_model, *wide, 3)[:, :1] - got).abs().max() <= 1e-5


def test_any_sampler(backend: str) -> None:
    a, b = ops.randn((1, 3, 4), seed=1), ops.randn((1, 3, 4), seed=2)
    sampler = DDIM(Schedule.cosine(100), steps=10)
    got = interpolate(toy_model, a, b, 3, sampler=sampler, backend=backend)
    assert torch.equal(got, sampler(toy_model, slerp(a, b, [0.0, 0.5, 1.0]), backend=backend))
    noisy = interpolate(toy_model, a, b, 9, sampler=DDPM(Schedule.linear(), steps=10), seed=[4] * 9, backend=backend)
    between = (noisy[1:] - noisy[:-1]).flatten(1).norm(dim=1)
    assert between.max() < 3 * between.min(), "one noise for all keeps the way smooth"


@pytest.mark.parametrize("n", [np.int64(3), np.int32(3), np.uint8(3)], ids=lambda n: type(n).__name__)
def test_numbers_of_numpy(n: Any) -> None:
    a, b = ops.randn((1, 3), seed=1), ops.randn((1, 3), seed=2)
    assert torch.equal(interpolate(toy_model, a, b, n), interpolate(toy_model, a, b, 3))


@pytest.mark.parametrize("n", [1, 0, -3, 2.0, "3", True, np.int64(1), None])
def test_how_many(n: Any) -> None:
    with pytest.raises(ValueError, match="n must be an int of at least 2"):
        interpolate(toy_model, torch.zeros(1, 3), torch.ones(1, 3), n)
