"""What k-diffusion's functions refuse: before the model is called, by an error that names the argument."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample.integrations import k_diffusion

X, SIGMAS = torch.zeros(2, 3), torch.tensor([4.0, 1.0, 0.0])


def never(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("called")


def levels(*values: float) -> dict[str, Any]:
    return {"sigmas": torch.tensor(values)}


OF_ALL: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "model": (TypeError, "model must be callable", {"model": torch.zeros(2)}),
    "x a list": (TypeError, "x must be a floating-point tensor", {"x": [[0.0]]}),
    "x of integers": (TypeError, "x must be a floating-point tensor", {"x": torch.zeros(2, 3, dtype=torch.int64)}),
    "x without axes": (ValueError, "x must have a first axis", {"x": torch.tensor(1.0)}),
    "x empty": (ValueError, "x must have a first axis of samples and no zero", {"x": torch.zeros(0, 3)}),
    "sigmas a list": (TypeError, "sigmas must be a tensor", {"sigmas": [4.0, 1.0]}),
    "sigmas of bools": (TypeError, "sigmas must hold real numbers", {"sigmas": torch.tensor([True, False])}),
    "sigmas empty": (ValueError, "sigmas must be a vector", levels()),
    "sigmas of two axes": (ValueError, "sigmas must be a vector", {"sigmas": torch.ones(3, 1)}),
    "sigmas a number": (ValueError, "sigmas must be a vector", {"sigmas": torch.tensor(1.0)}),
    "sigmas increasing": (ValueError, "sigmas must decrease, got 1.0 and then 4.0 at 1", levels(1.0, 4.0)),
    "sigmas with equal ones": (ValueError, "sigmas must decrease", levels(4.0, 2.0, 2.0, 0.0)),
    "sigmas with two zeros": (ValueError, "sigmas must decrease", levels(4.0, 0.0, 0.0)),
    "sigmas negative": (ValueError, "sigmas must be finite and at least 0, got -1.0 at 2", levels(4.0, 2.0, -1.0)),
    "sigmas NaN": (ValueError, "sigmas must be finite", levels(4.0, float("nan"), 0.0)),
    "sigmas infinite": (ValueError, "sigmas must be finite", levels(float("inf"), 1.0)),
    "sigmas beyond x": (ValueError, "sigmas must be at most 65504", {"x": X.half(), **levels(7e4, 0.0)}),
    "extra_args": (TypeError, "extra_args must be a mapping", {"extra_args": [("a", 1)]}),
    "callback no function": (TypeError, "callback must be callable", {"callback": 3}),
    "callback of two": (TypeError, "callback is called as callback(info)", {"callback": lambda info, more: None}),
}
CHURN = ("sample_euler", "sample_heun")
SDE = ("sample_euler_ancestral", "sample_dpmpp_2m_sde", "sample_ddim")
NOISY = (*SDE, "sample_lcm")
OWN: list[tuple[tuple[str, ...], type[Exception], str, dict[str, Any]]] = [
    (CHURN, ValueError, "s_churn must be at least 0", {"s_churn": -1.0}),
    (CHURN, ValueError, "s_tmin and s_tmax must not be NaN", {"s_tmin": float("nan")}),
    (CHURN, TypeError, "s_tmax must be a number", {"s_tmax": "all"}),
    ((*CHURN, *SDE), ValueError, "s_noise must be at least 0", {"s_noise": -0.5}),
    (SDE, ValueError, "eta must be at least 0", {"eta": -0.1}),
    (SDE, ValueError, "eta must be at least 0 and finite", {"eta": float("inf")}),
    (SDE, TypeError, "eta must be a number", {"eta": None}),
    (NOISY, TypeError, "noise_sampler must be callable", {"noise_sampler": torch.zeros(2, 3)}),
    (NOISY, TypeError, "noise_sampler is called as noise_sampler(sigma, sigma_next)", {"noise_sampler": lambda k: X}),
    (NOISY, ValueError, "noise_sampler or from seed", {"noise_sampler": never, "seed": 1}),
    ((*CHURN, *NOISY), ValueError, "index is a place in the set that seed names", {"index": 1}),
    ((*CHURN, *NOISY), TypeError, "seed must be", {"seed": 0.5}),
    ((*CHURN, *NOISY), ValueError, "seed must be", {"seed": [1, 2, 3]}),
    (("sample_dpmpp_2m_sde",), ValueError, "solver_type must be one of midpoint, heun", {"solver_type": "Heun2"}),
    (("sample_ipndm",), ValueError, "max_order must be at most 4", {"max_order": 5}),
    (("sample_ipndm",), ValueError, "max_order must be at least 1", {"max_order": 0}),
]


def refused(name: str, error: type[Exception], message: str, given: dict[str, Any]) -> None:
    arguments = {"model": never, "x": X, "sigmas": SIGMAS, "disable": True, **given}
    with pytest.raises(error, match=re.escape(message)):
        getattr(k_diffusion, name)(**arguments)


@pytest.mark.parametrize("name", k_diffusion.__all__)
@pytest.mark.parametrize("case", OF_ALL)
def test_arguments_of_all(name: str, case: str) -> None:
    refused(name, *OF_ALL[case])


@pytest.mark.parametrize(
    ("name", "error", "message", "given"),
    [pytest.param(name, *case, id=f"{name} {case[2]}") for names, *case in OWN for name in names],
)
def test_arguments_of_some(name: str, error: type[Exception], message: str, given: dict[str, Any]) -> None:
    refused(name, error, message, given)


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        pytest.param(torch.zeros(2, 6), ValueError, id="a variance half"),
        pytest.param(torch.zeros(1, 3), ValueError, id="a batch of one"),
        pytest.param(torch.zeros(2, 3, device="meta"), ValueError, id="another device"),
        pytest.param(torch.zeros(2, 3, dtype=torch.int64), TypeError, id="integers"),
        pytest.param((X,), TypeError, id="a tuple"),
    ],
)
@pytest.mark.parametrize("who", ["model", "noise_sampler"])
def test_what_functions_return(who: str, returned: Any, error: type[Exception]) -> None:
    model = (lambda x, sigma: returned) if who == "model" else (lambda x, sigma: x)
    noise_sampler = never if who == "model" else (lambda sigma, sigma_next: returned)
    with pytest.raises(error, match=rf"{who} must return a"):
        k_diffusion.sample_lcm(model, X, SIGMAS, disable=True, noise_sampler=noise_sampler)
