"""What a prepared run keeps of its options, what it is given anew, and who it runs for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastsample import DDIM, Schedule

SHAPE = (2, 4, 5)
SAMPLER = DDIM(Schedule.linear(), steps=4, eta=1.0)


def half(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.5


def conditioned(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return x * 0.25 + c


CHANGED: dict[str, tuple[Any, dict[str, Any]]] = {
    "seed": (torch.tensor([3, 4]), {}),
    "seed-array": (np.array([3, 4]), {}),
    "seed-list": ([3, 4], {}),
    "index": (torch.tensor([3, 4]), {"seed": 1}),
    "guidance": (torch.tensor([2.0, 3.0]), {"seed": 1, "uncond": {}}),
    "mask": (torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]), {"seed": 1, "known": torch.ones(1, 1, 1)}),
    "known": (torch.ones(SHAPE), {"seed": 1, "mask": torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])}),
}


@pytest.mark.parametrize("name", CHANGED)
def test_options_are_copied(name: str) -> None:
    value, others = CHANGED[name]
    argument = name.partition("-")[0]
    want = SAMPLER(half, SHAPE, **{argument: value}, **others)
    prepared = SAMPLER.prepare(half, SHAPE, **{argument: value}, **others)
    kept = value.copy() if isinstance(value, list) else value + 0
    try:
        value[1] = 0
        assert torch.equal(prepared(), want)
        prepared._waiting.clear()  # as where two threads call at once
        assert torch.equal(prepared(), want), "a second loop is made of the same"
    finally:
        value[1] = kept[1]


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("cast", [False, True], ids=["float32", "cast"])
def test_keywords_are_as_they_are_at_the_call(guided: bool, cast: bool) -> None:
    """Also where the model is given copies: of another dtype, or of both halves."""
    c = torch.zeros(2, 1, 1)
    keywords: dict[str, Any] = {"c": c}
    options: dict[str, Any] = {"model_dtype": torch.bfloat16} if cast else {}
    if guided:
        options |= {"guidance": 2.0, "cond": keywords, "uncond": {"c": torch.zeros(2, 1, 1)}}
    else:
        options |= {"model_kwargs": keywords}
    prepared = SAMPLER.prepare(conditioned, SHAPE, seed=1, **options)
    c.fill_(0.5)
    assert torch.equal(prepared(), SAMPLER(conditioned, SHAPE, seed=1, **options))
    keywords["c"] = torch.full((2, 1, 1), 0.25)
    assert torch.equal(prepared(), SAMPLER(conditioned, SHAPE, seed=1, **options))


@pytest.mark.parametrize("x", [SHAPE, np.zeros(SHAPE), 3.0], ids=["shape", "array", "number"])
def test_x_of_a_call_is_a_tensor(x: Any) -> None:
    prepared = SAMPLER.prepare(half, SHAPE)
    with pytest.raises(TypeError, match="x must be a tensor, got"):
        prepared(x)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"seed": 0.5}, TypeError), ({"seed": [1, 2, 3]}, ValueError), ({"index": -1}, ValueError)],
    ids=["type", "count", "negative"],
)
def test_bad_seeds_are_refused_at_once(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        SAMPLER.prepare(half, SHAPE, **options)


def test_preparing_draws_no_seed() -> None:
    before = torch.get_rng_state()
    SAMPLER.prepare(half, SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


def flops_of(run: Any) -> tuple[Tensor, int]:
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops()


def test_a_recorder_has_a_loop_of_its_own() -> None:
    weight = torch.eye(5) / 2

    def product(x: Tensor, t: Tensor) -> Tensor:
        return x @ weight

    want = SAMPLER(product, SHAPE, seed=1)
    prepared = SAMPLER.prepare(product, SHAPE, seed=1)
    recorded, flops = flops_of(prepared)
    assert torch.equal(recorded, want) and flops > 0
    assert torch.equal(prepared(), want)
    within, _ = flops_of(lambda: SAMPLER.prepare(product, SHAPE, seed=1))
    for _ in range(2):
        assert torch.equal(within(), want)
        assert flops_of(within)[1] == flops
    assert not any(loop.in_fresh_tensors for loop in (*prepared._waiting, *within._waiting))


def test_derivatives_go_through_a_prepared_run() -> None:
    scale = torch.tensor(0.5)
    held = [scale]
    prepared = SAMPLER.prepare(lambda x, t: x * held[0], SHAPE, seed=1)
    want = prepared()

    def of_scale(value: Tensor) -> Tensor:
        held[0] = value
        return prepared()

    result, tangent = torch.func.jvp(of_scale, (scale,), (torch.ones(()),))
    held[0] = scale
    assert torch.allclose(result, want, atol=1e-5) and tangent.abs().max() > 0.1
    assert torch.equal(prepared(), want)
