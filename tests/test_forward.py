"""add_noise and velocity: against float64, diffusers and the samplers' own noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import Schedule, add_noise, ops, velocity

SCHEDULE = Schedule.scaled_linear()
SHAPE = (4, 3, 5, 7)
TIMES = torch.tensor([0, 1, 500, 999])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x0, z = ops.randn((2, *SHAPE), seed=3).to(dtype)
    return x0, z


def expected(x0: Tensor, z: Tensor, t: Tensor, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """add_noise (sign 1) or velocity (-1) in float64, and the magnitudes of its two terms added up."""
    alpha_bar = SCHEDULE.alphas_cumprod[t.numpy()].reshape(-1, 1, 1, 1)
    of_x0, of_z = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    if sign < 0:
        of_x0, of_z = -of_z, of_x0
    terms = of_x0 * x0.double().numpy(), of_z * z.double().numpy()
    return sum(terms), sum(abs(term) for term in terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["add_noise", "velocity"])
def test_matches_float64(name: str, dtype: torch.dtype) -> None:
    x0, z = inputs(dtype)
    before = x0.clone(), z.clone()
    if name == "add_noise":
        got, (want, size) = add_noise(x0, TIMES, schedule=SCHEDULE, noise=z), expected(x0, z, TIMES, 1)
    else:
        got, (want, size) = velocity(x0, z, TIMES, schedule=SCHEDULE), expected(x0, z, TIMES, -1)
    assert got.dtype == dtype and torch.equal(x0, before[0]) and torch.equal(z, before[1])
    computed = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # Two coefficients, two products and a sum, half an eps each; then once to the dtype of the result.
    bound = 2.5 * computed * size + (torch.finfo(dtype).eps / 2 * abs(want) + torch.finfo(dtype).tiny)
    assert (abs(got.double().numpy() - want) <= bound).all()


@pytest.mark.parametrize("t", [0, 999, torch.tensor(500), np.int64(7)], ids=["first", "last", "tensor", "numpy"])
def test_one_timestep_for_all(t: Any) -> None:
    x0, z = inputs()
    times = torch.full((4,), int(t))
    got = add_noise(x0, t, schedule=SCHEDULE, noise=z)
    assert torch.equal(got, add_noise(x0, times, schedule=SCHEDULE, noise=z))
    assert torch.equal(velocity(x0, z, t, schedule=SCHEDULE), velocity(x0, z, times, schedule=SCHEDULE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seed_is_the_noise_of_stream_0(dtype: torch.dtype) -> None:
    x0, _ = inputs(dtype)
    seeds = [5, 9, 2**63, -1]
    z = ops.randn(SHAPE, seed=seeds)
    got = add_noise(x0, TIMES, schedule=SCHEDULE, seed=seeds)
    # The noise given in x0's own dtype would be rounded beforehand.
    assert torch.equal(got, add_noise(x0, TIMES, schedule=SCHEDULE, noise=z))
    alone = add_noise(x0[2:3], 500, schedule=SCHEDULE, seed=2**63)
    assert torch.equal(got[2:3], alone), "a sample does not depend on its batch"


def test_the_ends_of_a_schedule() -> None:
    x0, z = inputs()
    ends = Schedule.from_alphas_cumprod([1.0, 0.5, 0.0])
    assert torch.equal(add_noise(x0, 0, schedule=ends, noise=z), x0)
    assert torch.equal(add_noise(x0, 2, schedule=ends, noise=z), z)
    assert torch.equal(velocity(x0, z, 2, schedule=ends), -x0)


@pytest.mark.parametrize("shape", [(3,), (2, 6), (2, 3, 4, 5, 2)], ids=str)
def test_any_number_of_axes_and_strides(shape: tuple[int, ...]) -> None:
    x0, z = ops.randn((2, *shape), seed=1)
    t = torch.arange(shape[0]) * 300
    got = add_noise(x0, t, schedule=SCHEDULE, noise=z)
    for i in range(shape[0]):
        one = add_noise(x0[i : i + 1], int(t[i]), schedule=SCHEDULE, noise=z[i : i + 1])
        assert torch.equal(got[i : i + 1], one)
    if len(shape) > 1:
        strided = x0.transpose(0, -1).contiguous().transpose(0, -1)
        assert torch.equal(add_noise(strided, t, schedule=SCHEDULE, noise=z), got)


def test_gradients() -> None:
    x0, z = (one[:, :, :2, :2].clone().requires_grad_() for one in inputs(torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: add_noise(a, TIMES, schedule=SCHEDULE, noise=b), (x0, z))
    assert torch.autograd.gradcheck(lambda a, b: velocity(a, b, TIMES, schedule=SCHEDULE), (x0, z))
    assert torch.autograd.gradcheck(lambda a: add_noise(a, TIMES, schedule=SCHEDULE, seed=1), (x0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_diffusers(dtype: torch.dtype) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x0, z = inputs(dtype)
    # Its alpha bars are float32 products: up to 1e-4 of 1 - abar near t = 0, whose root counts here.
    tolerance = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        add_noise(x0, TIMES, schedule=SCHEDULE, noise=z), scheduler.add_noise(x0, z, TIMES), **tolerance
    )
    torch.testing.assert_close(
        velocity(x0, z, TIMES, schedule=SCHEDULE), scheduler.get_velocity(x0, z, TIMES), **tolerance
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"t": 1000}, ValueError, r"t must lie in \[0, 1000\), got 1000", id="t-high"),
        pytest.param({"t": torch.tensor([0, -1, 5, 1])}, ValueError, "got -1", id="t-negative"),
        pytest.param({"t": torch.zeros(3, dtype=torch.int64)}, ValueError, "one per sample", id="t-count"),
        pytest.param({"t": torch.zeros(4)}, TypeError, "int64", id="t-float-tensor"),
        pytest.param({"t": 0.5}, TypeError, "t must be an int", id="t-float"),
        pytest.param({"seed": 1}, ValueError, "seed= or noise=, not both", id="both"),
        pytest.param({"index": -4}, ValueError, "index must lie in", id="index-beside-noise"),
        pytest.param({"index": 0.5}, TypeError, "index must be an int", id="index-float"),
        pytest.param({"index": [1, 2]}, ValueError, "index must be one int or 4", id="index-count"),
        pytest.param({"noise": torch.zeros(4, 3)}, ValueError, "noise must have x0's shape", id="noise-shape"),
        pytest.param({"noise": torch.zeros(1, *SHAPE[1:])}, ValueError, "noise must have", id="would-broadcast"),
        pytest.param({"noise": torch.zeros(SHAPE, device="meta")}, ValueError, "meta", id="noise-device"),
        pytest.param({"noise": 1.0}, TypeError, "noise must be", id="noise-number"),
        pytest.param({"x0": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "x0 must be", id="x0-integers"),
        pytest.param({"x0": [1.0]}, TypeError, "x0 must be", id="x0-list"),
        pytest.param({"x0": torch.zeros(0, 3)}, ValueError, "x0 must", id="x0-empty"),
        pytest.param({"schedule": "linear"}, TypeError, "schedule must be", id="schedule"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"x0": torch.zeros(SHAPE), "t": 5, "schedule": SCHEDULE, "noise": torch.zeros(SHAPE)}
    arguments = {**good, **change}
    with pytest.raises(error, match=message):
        add_noise(arguments.pop("x0"), arguments.pop("t"), **arguments)
    if change.keys() & {"x0", "t", "noise", "schedule"} and arguments["noise"] is not None:
        both = {**good, **change}
        with pytest.raises(error, match=message):
            velocity(both["x0"], both["noise"], both["t"], schedule=both["schedule"])
