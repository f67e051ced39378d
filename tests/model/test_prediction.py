"""What a model predicts is asked of the model, as its schedule is."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsample
from fastsample import DDIM, Schedule, ops
from fastsample.model import prediction_of, target_of
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


# What its network gives


def exact_at_the_top(target: str | None) -> Net:
    net = Net("epsilon")
    net.schedule = Schedule.cosine()
    if target is not None:
        net.target = target
    return net


@pytest.mark.parametrize("name", ["ddim", "dpm_solver", "euler", "ddim_invert"])
@pytest.mark.parametrize(
    ("target", "spacing"), [("v", "trailing"), ("x0", "trailing"), ("epsilon", "auto"), (None, "auto")]
)
def test_a_model_that_is_exact_next_to_pure_noise_starts_there(name: str, target: str | None, spacing: str) -> None:
    """The error of its epsilon shrinks as fast as sigma / alpha grows: the default is "trailing" for it."""
    function, net = getattr(fastsample, name), exact_at_the_top(target)
    got = function(net, X, steps=4, clip=1.0)
    assert torch.equal(got, function(exact_at_the_top(None), X, steps=4, clip=1.0, timesteps=spacing))
    given = function(net, X, steps=4, clip=1.0, timesteps="leading")
    assert torch.equal(given, function(exact_at_the_top(None), X, steps=4, clip=1.0, timesteps="leading"))


def test_heun_does_not_start_there() -> None:
    got = fastsample.heun(exact_at_the_top("v"), X, steps=4)
    assert torch.equal(got, fastsample.heun(exact_at_the_top(None), X, steps=4, timesteps="auto"))


def test_interpolation_starts_there_too() -> None:
    sampler = DDIM(Schedule.cosine(), steps=50, timesteps="trailing")
    got = fastsample.interpolate(exact_at_the_top("v"), X[:1], X[1:], 3)
    assert torch.equal(got, fastsample.interpolate(exact_at_the_top("v"), X[:1], X[1:], 3, sampler=sampler))


def test_the_target_is_found_behind_wrappers() -> None:
    net = exact_at_the_top("v")
    for model in (net, nn.DataParallel(net), lambda x, t: net(x, t), net.forward):
        assert target_of(model) == "v"
    assert target_of(lambda x, t: x) is None and target_of(Net()) is None


@pytest.mark.parametrize("name", ["ddim", "dpm_solver", "euler"])
@pytest.mark.parametrize("target", ["v", "x0", "epsilon", None])
def test_only_errors_that_grow_are_warned_of(name: str, target: str | None) -> None:
    """Also in a second call, and whichever model the first one was for: samplers are kept."""
    function = getattr(fastsample, name)
    for net in (exact_at_the_top("v"), exact_at_the_top(target), exact_at_the_top(target)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            function(net, X, steps=4, timesteps="trailing")
        grows = any("multiplies the model's error" in str(one.message) for one in told)
        assert grows == (net.target not in ("v", "x0") if hasattr(net, "target") else True)
