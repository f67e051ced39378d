"""What a model predicts is asked of the model, as its schedule is."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsample
from fastsample import DDIM, Schedule, ops
from fastsample.model import prediction_of, variance_of
from fastsample.model.called_modules import called_modules

SHAPE = (2, 3, 4)
X = ops.randn(SHAPE, seed=1)


class Net(nn.Module):
    """A model that states what it predicts."""

    def __init__(self, prediction: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.1))
        self.schedule = Schedule.linear()
        if prediction is not None:
            self.prediction = prediction

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.weight * x


def text(value: str) -> str:
    """The same characters as another object, as a file gives them."""
    return "".join([*value])


V = Net("v")
WRAPPED: dict[str, Callable[..., Any]] = {
    "module": V,
    "data-parallel": nn.DataParallel(V),
    "only-child": nn.Sequential(V),
    "lambda": lambda x, t: V(x, t),
    "partial": functools.partial(V),
    "method": V.forward,
    "object": types.SimpleNamespace(prediction="v"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", WRAPPED)
def test_it_is_found_behind_wrappers(name: str) -> None:
    assert prediction_of(WRAPPED[name], None) == "v"


def test_two_models_must_agree() -> None:
    one, same, other = Net(text("v")), Net(text("v")), Net(text("x0"))
    agree, differ = lambda x, t: one(x, t) + same(x, t), lambda x, t: one(x, t) + other(x, t)
    assert len(called_modules(agree)) == len(called_modules(differ)) == 2
    assert prediction_of(agree, None) == "v" and prediction_of(differ, None) == "epsilon"


@pytest.mark.parametrize(
    "attribute", [None, nn.Linear(2, 2), 5, lambda: "v"], ids=["none", "layer", "number", "method"]
)
def test_whoever_says_nothing_predicts_epsilon(attribute: Any) -> None:
    assert prediction_of(Net(attribute), None) == "epsilon"
    assert prediction_of(lambda x, t: x, None) == "epsilon"


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm_solver", "euler", "euler_ancestral", "heun", "lcm", "tcd"])
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_functions_ask_the_model(name: str, prediction: str) -> None:
    function, net = getattr(fastsample, name), Net(prediction)
    got = function(net, X, steps=4, seed=0)
    assert torch.equal(got, function(net, X, steps=4, seed=0, prediction=prediction))
    plain = function(net, X, steps=4, seed=0, prediction="epsilon")
    assert not torch.equal(got, plain), "an argument wins"
    assert torch.equal(plain, function(Net(), X, steps=4, seed=0))


def test_inversion_and_interpolation_ask_it_too() -> None:
    net = Net("v")
    noise = fastsample.ddim_invert(net, X, steps=5)
    assert torch.equal(noise, fastsample.ddim_invert(net, X, steps=5, prediction="v"))
    assert torch.equal(noise, fastsample.euler_invert(net, X, steps=5))
    between = fastsample.interpolate(net, X[:1], X[1:], 3)
    want = fastsample.interpolate(net, X[:1], X[1:], 3, sampler=DDIM(net.schedule, steps=50, prediction="v"))
    assert torch.equal(between, want)


def test_a_flow_needs_no_word_either() -> None:
    net = Net("flow")
    got = fastsample.euler(net, X, steps=4, shift=3.0)
    assert torch.equal(got, fastsample.euler(Net(), X, steps=4, prediction="flow", shift=3.0))
    with pytest.raises(ValueError, match="prediction='flow'"):
        fastsample.ddim(net, X, steps=4)


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prediction must be one of epsilon, v, x0, flow, got 'noise'"):
        fastsample.ddim(Net("noise"), X, steps=4)


def test_samplers_do_not_ask() -> None:
    assert DDIM(Schedule.linear()).prediction == "epsilon"
    assert torch.equal(
        DDIM(Schedule.linear(), steps=4)(Net("v"), X), fastsample.ddim(Net("v"), X, steps=4, prediction="epsilon")
    )


@pytest.mark.parametrize(
    ("stated", "given", "found"),
    [
        ("learned_range", None, "learned_range"),
        ("learned_range", "fixed_large", "fixed_large"),
        (torch.ones(3), None, "fixed_small"),
        (None, None, "fixed_small"),
    ],
    ids=["stated", "given", "something-else", "nothing"],
)
def test_the_variance_is_the_models(stated: Any, given: str | None, found: str) -> None:
    assert variance_of(types.SimpleNamespace(variance=stated), given) == found  # type: ignore[arg-type]
