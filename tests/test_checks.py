"""The checks that all rooms share: what they take, and one wording for what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample
from fastsample import DDIM, DDPM, Schedule, Stop, ops
from fastsample.broadcast import per_sample
from fastsample.checks import check_floating, check_number, checked_shape, integer, real, real_array
from fastsample.integrations import k_diffusion
from fastsample.train.losses import HybridLoss

NUMBERS = [3, 0.5, np.float32(0.5), np.int8(3), torch.tensor(0.5), np.array(3), float("inf")]
NO_NUMBERS = [True, np.True_, torch.tensor(True), "1", None, 1j, torch.ones(1), np.ones(2), [1.0]]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_numbers_of_python_numpy_and_torch_are_taken(value: Any) -> None:
    check_number("eta", value)
    assert type(real("eta", value)) is float and real("eta", value) == float(value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused_by_its_name(value: Any) -> None:
    for check in (check_number, real):
        with pytest.raises(TypeError, match=r"^eta must be a number, got "):
            check("eta", value)


def test_an_integer_beyond_all_floats_is_a_number_and_no_float() -> None:
    check_number("eta", 10**400)
    with pytest.raises(ValueError, match=r"^eta is beyond what a float holds, got 1000"):
        real("eta", 10**400)


@pytest.mark.parametrize("value", [1.0, True, np.bool_(1), "1", None, torch.tensor(1.0)], ids=repr)
def test_what_is_no_integer_is_refused_by_its_name(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^steps must be an int, got "):
        integer("steps", value)


def test_integers_have_ends() -> None:
    assert integer("steps", torch.tensor(3), 1, 3) == 3
    with pytest.raises(ValueError, match=r"^steps must be at least 1, got 0$"):
        integer("steps", np.int64(0), 1)
    with pytest.raises(ValueError, match=r"^steps must be at most 3, got 4$"):
        integer("steps", 4, 1, 3)


def test_arrays_are_copies_and_of_numbers() -> None:
    values = np.ones(2)
    real_array("betas", values)[0] = 5.0
    assert values[0] == 1.0
    assert real_array("betas", torch.ones(2, dtype=torch.bfloat16, requires_grad=True)).tolist() == [1.0, 1.0]
    assert real_array("betas", [2**70, 1]).dtype == np.float64
    with pytest.raises(TypeError, match=r"^betas must hold real numbers, got bool$"):
        real_array("betas", [True, False])
    with pytest.raises(ValueError, match=r"^betas must be an array of numbers, got "):
        real_array("betas", [[1.0], [1.0, 2.0]])


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        pytest.param("ab", TypeError, "must be a sequence of ints, got str", id="text"),
        pytest.param((2, 3.0), TypeError, r"must be a sequence of ints, got \(2, 3.0\)", id="float"),
        pytest.param((2, True), TypeError, r"must be a sequence of ints, got \(2, True\)", id="bool"),
        pytest.param((), ValueError, r"must have a first axis of samples and no zero, got \(\)", id="no-axis"),
        pytest.param((2, 0), ValueError, r"must have a first axis of samples and no zero, got \(2, 0\)", id="zero"),
    ],
)
def test_shapes_of_batches(shape: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^x {message}$"):
        checked_shape("x", shape)
    assert checked_shape("x", [2, 3]) == torch.Size((2, 3))


@pytest.mark.parametrize(
    ("value", "got"), [(torch.ones(1, dtype=torch.int64), "torch.int64"), ([1.0], "list"), (np.ones(1), "float64")]
)
def test_tensors_that_are_not_floating(value: Any, got: str) -> None:
    check_floating("x0", torch.ones(1).half())
    with pytest.raises(TypeError, match=f"^x0 must be a floating-point tensor, got {got}$"):
        check_floating("x0", value)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_value_for_each_sample_broadcasts(batch: int) -> None:
    x, values = torch.randn(3, 2, 4), torch.randn(batch)
    assert torch.equal(
        per_sample(values, x) * x, torch.stack([v * s for v, s in zip(values.expand(3), x, strict=True)])
    )
    assert per_sample(values, x[:, 0, 0]).shape == (batch,)


# Devices, and tensors without values


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.1 * x


def stop_with(sample: Tensor) -> Callable[[object], None]:
    def stop(step: object) -> None:
        raise Stop(sample)

    return stop


SCHEDULE = Schedule.linear(100)
SAMPLER, GAUSSIAN = DDIM(SCHEDULE, steps=3), DDPM(SCHEDULE, steps=3).table
X, NOWHERE = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, device="meta")
INTEGERS, NUMBERS_THERE = torch.zeros(2, dtype=torch.int64, device="meta"), torch.zeros(2, device="meta")
# By what takes a device.
ON: dict[str, Callable[[Any], object]] = {
    "ddim": lambda device: fastsample.ddim(model, X, steps=2, schedule=SCHEDULE, device=device),
    "lcm": lambda device: fastsample.lcm(model, (2, 3), steps=2, schedule=SCHEDULE, device=device),
    "ddim_invert": lambda device: fastsample.ddim_invert(model, X, steps=2, schedule=SCHEDULE, device=device),
    "prepare": lambda device: SAMPLER.prepare(model, X.shape, device=device),
    "iterate": lambda device: SAMPLER.iterate(model, X.shape, device=device),
    "graph": lambda device: fastsample.graph(SAMPLER, model, X.shape, device=device),
    "interpolate": lambda device: fastsample.interpolate(model, X[:1], X[1:], 3, sampler=SAMPLER, device=device),
    "optimal_timesteps": lambda device: fastsample.optimal_timesteps(model, (2, 3), 3, sampler=SAMPLER, device=device),
    "randn": lambda device: ops.randn((2, 3), device=device),
    "randn-out": lambda device: ops.randn((2, 3), out=torch.zeros(2, 3), device=device),
    "HybridLoss": lambda device: HybridLoss(SCHEDULE, device),
}
NO_DEVICES = ["cuda:99", torch.device("cuda:99"), "xla", "bogus", "cuda:x", "cpu:", torch.device("mps")]


@pytest.mark.parametrize("device", NO_DEVICES, ids=str)
@pytest.mark.parametrize("name", ON)
def test_a_device_that_is_not_here(name: str, device: Any) -> None:
    with pytest.raises(ValueError, match=f"^device '{device}' cannot be used: "):
        ON[name](device)


@pytest.mark.parametrize("device", [1.5, ["cpu"], True, b"cpu"], ids=repr)
@pytest.mark.parametrize("name", ON)
def test_what_is_no_device(name: str, device: Any) -> None:
    with pytest.raises(TypeError, match=r"^device must be a torch\.device or the name of one"):
        ON[name](device)


WITHOUT_VALUES: dict[str, tuple[str, Callable[[], object]]] = {
    "save_grid": ("samples", lambda: fastsample.save_grid(NOWHERE, "grid.png")),
    "Stop": ("sample of fastsample.Stop", lambda: SAMPLER(model, X, callback=stop_with(NOWHERE))),
    "add_noise": ("t", lambda: fastsample.add_noise(X, INTEGERS, schedule=SCHEDULE)),
    "add_noise-flow": ("t", lambda: fastsample.add_noise(X, NUMBERS_THERE, prediction="flow")),
    "add_noise-seed": ("seed", lambda: fastsample.add_noise(X, 5, schedule=SCHEDULE, seed=INTEGERS)),
    "add_noise-noise": ("noise", lambda: fastsample.add_noise(X, 5, schedule=SCHEDULE, noise=NOWHERE)),
    "velocity": ("t", lambda: fastsample.velocity(X, X, INTEGERS, schedule=SCHEDULE)),
    "step-m": ("model_output", lambda: ops.step(X, NOWHERE, GAUSSIAN, 0, seed=0)),
    "step-row": ("row", lambda: ops.step(X, X, GAUSSIAN, INTEGERS, seed=0)),
    "step-row-there": ("row", lambda: ops.step(NOWHERE, NOWHERE, GAUSSIAN, INTEGERS, seed=0)),
    "step-seed": ("seed", lambda: ops.step(X, X, GAUSSIAN, 0, seed=INTEGERS)),
    "step-guidance": (
        "guidance",
        lambda: ops.step(X, torch.cat([X, X]), GAUSSIAN, 0, seed=0, guidance=NUMBERS_THERE),
    ),
    "posterior-row": ("row", lambda: ops.posterior(NOWHERE, NOWHERE, GAUSSIAN, INTEGERS)),
    "likelihood-row": ("row", lambda: ops.likelihood(X, X, X, GAUSSIAN, INTEGERS)),
    "randn-index": ("index", lambda: ops.randn((2, 3), seed=1, index=INTEGERS)),
    "ddim-guidance": ("guidance", lambda: SAMPLER(model, X, guidance=NUMBERS_THERE, uncond={})),
    "ddim-mask": ("mask", lambda: SAMPLER(model, X, mask=NOWHERE, known=X)),
    "ddim-known": ("known", lambda: SAMPLER(model, X, mask=X, known=NOWHERE)),
    "ddim-timesteps": ("timesteps", lambda: fastsample.ddim(model, X, timesteps=INTEGERS, schedule=SCHEDULE)),
    "correct_x0": (
        "what correct_x0 returned",
        lambda: DDIM(SCHEDULE, steps=2, correct_x0=lambda x, t: NOWHERE)(model, X),
    ),
    "nll": ("x0", lambda: fastsample.nll(model, NOWHERE, schedule=SCHEDULE, steps=2)),
    "slerp": ("weight", lambda: fastsample.slerp(X, X, NUMBERS_THERE)),
    "embedding": ("the guidance scale", lambda: fastsample.guidance_scale_embedding(NUMBERS_THERE, 8)),
    "Schedule": ("alphas_cumprod", lambda: Schedule.from_alphas_cumprod(NUMBERS_THERE)),
    "sigmas": ("sigmas", lambda: k_diffusion.sample_euler(model, X, NUMBERS_THERE, disable=True)),
}


@pytest.mark.parametrize("name", WITHOUT_VALUES)
def test_a_tensor_on_meta_where_values_are_needed(name: str) -> None:
    named, call = WITHOUT_VALUES[name]
    with pytest.raises(ValueError, match=rf"^{named} (lies on .*meta|must have .* on meta)"):
        call()


@pytest.mark.parametrize("rows", [0, torch.tensor([0, 2])], ids=["one", "each"])
def test_whole_calls_on_meta_tell_shapes(rows: Any) -> None:
    for got in (
        ops.step(NOWHERE, NOWHERE, GAUSSIAN, rows, seed=0),
        *ops.posterior(NOWHERE, NOWHERE, GAUSSIAN, rows),
        SAMPLER(model, NOWHERE, seed=0),
        fastsample.add_noise(NOWHERE, 5, schedule=SCHEDULE, seed=0),
    ):
        assert got.is_meta and got.shape == NOWHERE.shape
    assert ops.likelihood(NOWHERE, NOWHERE, NOWHERE, GAUSSIAN, rows).shape == (2,)


@pytest.mark.parametrize("values", [10**400, [1, -(10**400)], [10**400, 2.5]], ids=["one", "list", "mixed"])
def test_integers_beyond_all_floats_are_infinite_in_arrays(values: Any) -> None:
    got = real_array("a", values)
    assert np.isinf(got).sum() == 1 and got.dtype == np.float64
