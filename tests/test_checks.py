"""The checks that all rooms share: what they take, and one wording for what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastsample.broadcast import per_sample
from fastsample.checks import check_floating, check_number, checked_shape, integer, real, real_array

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
