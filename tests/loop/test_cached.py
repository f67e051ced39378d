"""A cached model: what it skips, that samples stay their own, that runs do, and where it is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsample
from fastsample import DDIM, Batcher, Heun, Schedule, cached
from fastsample.loop.cached import Cached
from support.chains import toy_model

SHAPE = (4, 2, 6, 6)
SCHEDULE = Schedule.scaled_linear()


class Counting:
    """The toy model, the times of whose calls are kept."""

    schedule, prediction = SCHEDULE, "epsilon"

    def __init__(self) -> None:
        self.times: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        self.times.append(int(t[0]))
        return toy_model(x, t)


def run(threshold: float, steps: int = 50, **options: Any) -> tuple[Tensor, list[int]]:
    model = Counting()
    x: Tensor = DDIM(SCHEDULE, steps=steps)(cached(model, threshold), SHAPE, seed=1, **options)
    return x, model.times


def test_a_threshold_of_0_skips_nothing() -> None:
    want = DDIM(SCHEDULE, steps=50)(toy_model, SHAPE, seed=1)
    x, times = run(0.0)
    assert torch.equal(x, want) and len(times) == 50


def test_higher_thresholds_skip_more_and_lose_more() -> None:
    want = DDIM(SCHEDULE, steps=50)(toy_model, SHAPE, seed=1)
    found = [run(threshold) for threshold in (0.05, 0.2, 0.8)]
    calls = [len(times) for _, times in found]
    losses = [(x - want).abs().mean().item() for x, _ in found]
    assert 50 > calls[0] > calls[1] > calls[2] >= 10
    assert 0 < losses[0] < losses[1] < losses[2] < 0.2 * want.abs().mean()


def test_the_ends_of_a_run_are_called() -> None:
    times, every = run(5.0)[1], DDIM(SCHEDULE, steps=50).table.t.tolist()
    assert times[:8] == every[:8] and times[-3:] == every[-3:]
    assert not set(times[8:-3]) & set(every[8:-3]), "and nothing else, with such a threshold"


@pytest.mark.parametrize("looked_at", [False, True], ids=["plain", "watched"])
def test_a_sample_does_not_depend_on_its_batch(looked_at: bool) -> None:
    """One sample moves far more than the others, so that it is called in more rows."""
    scale = torch.tensor([1.0, 1.0, 8.0, 1.0]).reshape(4, 1, 1, 1)

    def model(x: Tensor, t: Tensor, scale: Tensor) -> Tensor:
        return torch.sin(scale * x + t.reshape(-1, 1, 1, 1) / 100)

    sampler, options = DDIM(SCHEDULE, steps=40), {"callback": lambda step: None} if looked_at else {}
    together = sampler(cached(model, 0.3), SHAPE, seed=2, model_kwargs={"scale": scale}, **options)
    for i in range(4):
        alone = sampler(
            cached(model, 0.3), (1, *SHAPE[1:]), seed=2, index=i, model_kwargs={"scale": scale[i : i + 1]}, **options
        )
        assert torch.equal(together[i : i + 1], alone)


def test_runs_do_not_see_each_other() -> None:
    model = cached(Counting(), 0.3)
    sampler = DDIM(SCHEDULE, steps=30)
    first = sampler(model, SHAPE, seed=1)
    interleaved = [sampler.iterate(model, SHAPE, seed=seed) for seed in (1, 9)]
    for step, _ in zip(*interleaved, strict=True):
        last = step.x.clone()
    assert torch.equal(last, first) and torch.equal(sampler(model, SHAPE, seed=1), first)
    prepared = sampler.prepare(model, SHAPE)
    assert torch.equal(prepared(seed=1), first) and torch.equal(prepared(seed=1), first)


def test_a_guided_run_caches_both_halves() -> None:
    calls: list[int] = []

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        calls.append(len(x))
        return toy_model(x, t) + 0.1 * c.reshape(-1, 1, 1, 1)

    keywords = {"cond": {"c": torch.ones(4)}, "uncond": {"c": torch.zeros(4)}}
    sampler = DDIM(SCHEDULE, steps=40)
    want = sampler(model, SHAPE, seed=1, guidance=3.0, **keywords)
    calls.clear()
    got = sampler(cached(model, 0.1), SHAPE, seed=1, guidance=3.0, **keywords)
    assert set(calls) == {8} and len(calls) < 36
    assert (got - want).abs().mean() < 0.05 * want.abs().mean()
    interval = sampler(cached(model, 0.1), SHAPE, seed=1, guidance=3.0, guidance_interval=(300, 700), **keywords)
    assert interval.isfinite().all()


def test_a_learned_variance_comes_along() -> None:
    model = fastsample.zoo.digits()
    x = fastsample.ddpm(cached(model, 0.1), (2, 1, 28, 28), steps=20, seed=0, clip=1.0, variance="learned_range")
    assert x.shape == (2, 1, 28, 28) and x.isfinite().all()


def test_what_samplers_ask_of_the_model_is_the_models_own() -> None:
    model = cached(Counting(), 0.1)
    assert model.schedule is SCHEDULE and model.prediction == "epsilon"
    assert fastsample.ddim(model, SHAPE, steps=20, seed=0).shape == SHAPE
    with pytest.raises(AttributeError):
        model.config  # noqa: B018


def test_a_model_may_write_all_its_outputs_into_one_buffer() -> None:
    buffer = torch.empty(SHAPE)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return buffer.copy_(toy_model(x, t))

    sampler = DDIM(SCHEDULE, steps=40)
    assert torch.equal(sampler(cached(model, 0.2), SHAPE, seed=1), sampler(cached(toy_model, 0.2), SHAPE, seed=1))


def test_samples_of_one_axis_a_last_row_that_stays_and_copies() -> None:
    final = float(SCHEDULE.alphas_cumprod[0])
    sampler = DDIM(SCHEDULE, steps=50, timesteps="leading", final_alpha_cumprod=final)
    assert sampler(cached(toy_model, 0.1), (3,), seed=1).isfinite().all()
    copied = copy.deepcopy(cached(fastsample.zoo.digits(), 0.1))
    assert type(copied) is Cached and copied.threshold == 0.1


REFUSED: dict[str, Any] = {
    "few calls": (
        lambda: DDIM(SCHEDULE, steps=11)(cached(toy_model), SHAPE),
        "12 model calls, this one has 11",
    ),
    "a part of a run": (
        lambda: DDIM(SCHEDULE, steps=20)(cached(toy_model), torch.zeros(SHAPE), start_step=10),
        "at least 12 model calls, this one has 10",
    ),
    "Heun": (lambda: Heun(SCHEDULE, steps=20)(cached(toy_model), SHAPE), "two model calls a step"),
    "a Batcher": (lambda: Batcher(cached(toy_model), DDIM(SCHEDULE, steps=20), batch=2), "takes no cached model"),
    "a graph": (lambda: fastsample.graph(DDIM(SCHEDULE, steps=20), cached(toy_model), SHAPE), "cannot capture"),
    "a transform": (
        lambda: torch.func.vmap(lambda x: DDIM(SCHEDULE, steps=20)(cached(toy_model), x))(torch.zeros(2, *SHAPE)),
        "decides by values",
    ),
    "a negative threshold": (lambda: cached(toy_model, -0.1), "threshold must not be negative"),
    "no number": (lambda: cached(toy_model, "much"), "threshold"),  # type: ignore[arg-type]
    "no model": (lambda: cached(3), "model must be callable"),  # type: ignore[arg-type]
    "twice": (lambda: cached(cached(toy_model)), "cached one already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()
