"""What fastsample.graph and its replays refuse, and that nothing has changed then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import DDIMInverse, graph
from support.cuda_graphs import NOISY, host
from support.pretend_device import Device
from support.whole_runs import COND, GUIDED, SCHEDULE, SHAPE, X, model, moved, never


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"callback": print}, ValueError, "cannot capture callback: nothing can look in", id="callback"),
        pytest.param({"progress": True}, ValueError, "cannot capture progress", id="progress"),
        pytest.param({"decode": abs}, ValueError, "cannot capture decode: .* decode what the graph", id="decode"),
        pytest.param({"out": X}, ValueError, "cannot capture out: each call", id="out"),
        pytest.param({"noise": lambda k: X}, ValueError, "cannot capture noise: .* from the seed", id="noise"),
        pytest.param({"noise": [torch.Generator()]}, ValueError, "cannot capture noise", id="generator"),
        pytest.param({"device": "cpu"}, ValueError, "needs a CUDA device, .* would lie on cpu", id="cpu"),
        pytest.param({"steps": 5}, TypeError, r"steps belongs to ddim\(", id="unknown"),
        pytest.param({"guidance": 2.0}, ValueError, "needs uncond=", id="bad-option"),
    ],
)
def test_refused_before_the_model_is_called(
    device: Device, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        graph(NOISY, never, SHAPE, **{"device": "cuda", **options})


def test_refused_samplers_and_gradients(device: Device) -> None:
    with pytest.raises(TypeError, match="sampler must be"):
        graph(model, model, SHAPE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="example requires gradients"):
        graph(NOISY, model, X.clone().requires_grad_())
    with pytest.raises(TypeError, match="x0 must be a tensor"):
        graph(DDIMInverse(SCHEDULE, steps=2), model, SHAPE)


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": ({"x": X[:1]}, ValueError, r"run's shape \(2, 3, 4, 5\), got \(1, 3, 4, 5\)"),
    "not-a-tensor": ({"x": SHAPE}, TypeError, "x must be a tensor, got tuple"),
    "integers": ({"x": X.long()}, TypeError, "x must be a shape or a floating-point tensor"),
    "float64": ({"x": X.double()}, ValueError, "x is torch.float64, and the run"),
    "gradients": ({"x": X.clone().requires_grad_()}, ValueError, "x requires gradients"),
    "seeds": ({"seed": [1, 2, 3]}, ValueError, "seed must be one int or 2"),
    "seed": ({"seed": 0.5}, TypeError, "seed must be an int"),
    "out": ({"out": torch.zeros(SHAPE)}, ValueError, "out must have shape"),
    "out-dtype": ({"out": X.double()}, TypeError, "out must be a torch.float32"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_change_nothing(device: Device, name: str) -> None:
    arguments, error, message = BAD_CALLS[name]
    captured = graph(NOISY, model, SHAPE, device="cuda")
    with pytest.raises(error, match=message):
        captured(**arguments)
    assert torch.equal(host(captured(seed=6)), NOISY(model, SHAPE, seed=6))


BAD_UPDATES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "name": ({"start_step": 1}, TypeError, "cannot change start_step; it can change model_kwargs"),
    "absent": ({"model_kwargs": {"c": COND}}, ValueError, "model_kwargs can be changed only"),
    "absent-mask": ({"mask": X}, ValueError, "mask can be changed only"),
    "none": ({"cond": None}, ValueError, "cond can be changed only to a value"),
    "keywords": ({"cond": {"c": COND, "d": 1}}, ValueError, "captured; only one call has d"),
    "shape": ({"cond": {"c": COND[:1]}}, ValueError, r"cond.c must be torch.float32 of shape \(2, 3, 1, 1\) on cuda"),
    "dtype": ({"uncond": {"c": COND.double()}}, ValueError, "uncond.c must be torch.float32"),
    "not-a-tensor": ({"cond": {"c": 1.0}}, ValueError, "cond.c is captured as it was"),
    "one": ({"guidance": 1.0}, ValueError, "guidance other than 1 needs both halves"),
    "weights": ({"guidance": [1.0, 2.0, 3.0]}, ValueError, "guidance must be one number or 2"),
    "second-of-two": (
        {"cond": {"c": COND * 5}, "uncond": {"c": COND[:1]}},
        ValueError,
        "uncond.c must be torch.float32",
    ),
}


@pytest.mark.parametrize("name", BAD_UPDATES)
def test_bad_updates_change_nothing(device: Device, name: str) -> None:
    inputs, error, message = BAD_UPDATES[name]
    captured = graph(NOISY, model, SHAPE, device="cuda", **moved(GUIDED, "cuda"))
    with pytest.raises(error, match=message):
        captured.update(**moved(inputs, "cuda"))
    assert torch.equal(host(captured(seed=6)), NOISY(model, SHAPE, seed=6, **GUIDED))


def test_a_condition_from_another_device_is_refused(device: Device) -> None:
    captured = graph(NOISY, model, SHAPE, device="cuda", **moved(GUIDED, "cuda"))
    with pytest.raises(ValueError, match=r"cond\.c must be .* on cuda:0, as at capture; got .* on cpu"):
        captured.update(cond={"c": COND})


def test_a_model_that_cannot_be_captured(device: Device) -> None:
    def reads(x: Tensor, t: Tensor) -> Tensor:
        if device.strict:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    with pytest.raises(RuntimeError, match="the model cannot be captured: does it read results") as caught:
        graph(NOISY, reads, SHAPE, device="cuda")
    assert "stream is capturing" in str(caught.value.__cause__)


def test_autocast_with_its_cache_is_refused(device: Device) -> None:
    with autocast(cache=True), pytest.raises(ValueError, match=r'torch.autocast\("cuda", cache_enabled=False\)'):
        graph(NOISY, never, SHAPE, device="cuda")
    with autocast(cache=False):
        captured = graph(NOISY, model, SHAPE, device="cuda")
    assert torch.equal(host(captured(seed=6)), NOISY(model, SHAPE, seed=6))


@contextmanager
def autocast(cache: bool) -> Iterator[None]:
    """What torch.autocast("cuda") sets: without a GPU it warns, and sets nothing."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_cache_enabled(cache)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_cache_enabled(cached)
