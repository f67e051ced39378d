"""Runs in torch.inference_mode, whose tensors keep no count of writes and cannot be written outside of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastsample import DDIM, Batcher, DPMSolver, Schedule

SHAPE = (2, 3, 4, 5)
SAMPLER = DDIM(Schedule.linear(), steps=4, eta=1.0)


def half(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.5


def strided(x: Tensor, t: Tensor) -> Tensor:
    return (x * 0.5).contiguous(memory_format=torch.channels_last)


def quiet(step: object) -> None:
    pass


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "watched": {"callback": quiet},
    "guided": {"guidance": 2.0, "uncond": {}},
    "half": {"model_dtype": torch.bfloat16},
    "reference": {"backend": "reference"},
    "inpainting": {"mask": torch.ones(4, 5).tril(), "known": torch.zeros(SHAPE)},
    "strength": {"strength": 0.5},
}


@pytest.mark.parametrize("model", [half, strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_recorder_may_follow_a_run(name: str, model: Callable[..., Tensor]) -> None:
    x = torch.linspace(-1, 1, 120).reshape(SHAPE)
    want = SAMPLER(model, x, seed=1, **OPTIONS[name])
    with torch.inference_mode(), FlopCounterMode(display=False):
        got = SAMPLER(model, x, seed=1, **OPTIONS[name])
    assert torch.equal(got, want)


@pytest.mark.parametrize("sampler", [SAMPLER, DPMSolver(Schedule.linear(), steps=4)], ids=["ddim", "dpm-solver"])
def test_a_model_in_inference_mode(sampler: Any) -> None:
    want = sampler(strided, SHAPE, seed=1)
    inside = torch.inference_mode()(strided)
    prepared = sampler.prepare(inside, SHAPE)
    for _ in range(2):
        assert torch.equal(sampler(inside, SHAPE, seed=1), want)
        assert torch.equal(prepared(seed=1), want)


def test_strided_outputs_in_inference_mode_and_then_outside() -> None:
    want = SAMPLER(strided, SHAPE, seed=1)
    prepared = SAMPLER.prepare(strided, SHAPE)
    batcher = Batcher(strided, SAMPLER, batch=2)
    with torch.inference_mode():
        assert torch.equal(prepared(seed=1), want)
        first = batcher.submit(SHAPE[1:], seed=1)
        batcher.step()
    assert torch.equal(prepared(seed=1), want)
    assert torch.equal(SAMPLER(strided, SHAPE, seed=1), want)
    assert torch.equal(first.result(), want[0])


def test_what_a_model_writes_is_refused_where_torch_counts() -> None:
    def writes(x: Tensor, t: Tensor) -> Tensor:
        return x.mul_(0.5)

    with torch.inference_mode(), pytest.raises(ValueError, match="wrote to its argument x"):
        SAMPLER(writes, SHAPE, seed=1)
