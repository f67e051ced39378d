"""Sampler.prepare, the memory that short runs share, and the samplers that functions keep."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastsample
from fastsample import DDIM, DDPM, DPMSolver, DynamicThreshold, Sampler, Schedule
from fastsample.loop import pool
from fastsample.samplers import kept
from support.whole_runs import RUNS, SHAPE, Run, X

SCHEDULE = Schedule.linear()
SMALL = (1, 4, 5)
NOISY = DDIM(SCHEDULE, steps=4, eta=1.0)


def half(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.5


def parts(run: Run) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(sampler, model, x, options) of a whole run."""
    return run.make(), run.model, run.x, dict(run.options)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if "noise" not in run.options])
def test_a_prepared_run_has_the_bits_of_the_plain_one(name: str) -> None:
    sampler, of_run, x, options = parts(RUNS[name])
    want = sampler(of_run, x, **options)
    seed = options.pop("seed")
    prepared = sampler.prepare(of_run, x, **options)
    for _ in range(3):
        assert torch.equal(prepared(seed=seed), want)
    own = sampler.prepare(of_run, x, **options, seed=seed)
    assert torch.equal(own(), want)


def test_what_a_call_may_change() -> None:
    def conditioned(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return x * 0.25 + c

    first, second = torch.zeros(2, 1, 1, 1), torch.linspace(0, 1, 2).reshape(2, 1, 1, 1)
    prepared = NOISY.prepare(conditioned, SHAPE, seed=3, model_kwargs={"c": first})
    for c in (second, first, second):
        want = NOISY(conditioned, SHAPE, seed=5, index=2, model_kwargs={"c": c})
        assert torch.equal(prepared(seed=5, index=2, model_kwargs={"c": c}), want)
    assert torch.equal(prepared(), NOISY(conditioned, SHAPE, seed=3, model_kwargs={"c": first})), "its own again"
    out = torch.full(SHAPE, torch.nan)
    assert prepared(X, seed=4, out=out) is out
    assert torch.equal(out, NOISY(conditioned, X, seed=4, model_kwargs={"c": first}))


def test_guidance_of_a_prepared_run() -> None:
    def conditioned(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return x * 0.25 + c

    cond, other, none = (torch.full((2, 1, 1, 1), value) for value in (1.0, 0.5, 0.0))
    given = {"guidance": [2.0, 3.0], "uncond": {"c": none}}
    prepared = NOISY.prepare(conditioned, SHAPE, cond={"c": cond}, **given)
    for c in (cond, other, cond):
        assert torch.equal(prepared(seed=1, cond={"c": c}), NOISY(conditioned, SHAPE, seed=1, cond={"c": c}, **given))


def test_x_may_be_given_at_the_call_or_before() -> None:
    sampler = DDIM(SCHEDULE, steps=4)
    first = X.clone()
    prepared = sampler.prepare(half, first)
    want = sampler(half, X)
    first.zero_()
    assert torch.equal(prepared(), want), "what was given is kept, not the caller's memory"
    assert torch.equal(prepared(2 * X), sampler(half, 2 * X))
    assert torch.equal(prepared(X.double().float().half()), sampler(half, X.half()))
    assert torch.equal(prepared(), want)


def test_results_are_memory_of_their_own() -> None:
    prepared = NOISY.prepare(half, SMALL)
    results = [prepared(seed=seed) for seed in range(4)]
    plain = [NOISY(half, SMALL, seed=seed) for seed in range(4)]
    for seed in range(4):
        want = NOISY(half, SMALL, seed=seed)
        assert torch.equal(results[seed], want)
        assert torch.equal(plain[seed], want)
    assert len({one.data_ptr() for one in (*results, *plain)}) == 8


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_a_run_inside_a_run(prepared: bool) -> None:
    inner_want = NOISY(half, SMALL, seed=2)
    depth = []

    def nesting(x: Tensor, t: Tensor) -> Tensor:
        if not depth:
            depth.append(1)
            assert torch.equal(run(seed=2), inner_want_of_nesting)
            depth.pop()
        return x * 0.5

    def plain(**options: Any) -> Tensor:
        return NOISY(nesting, SMALL, **options)

    inner_want_of_nesting = inner_want
    run: Callable[..., Tensor] = NOISY.prepare(nesting, SMALL) if prepared else plain
    assert torch.equal(run(seed=1), NOISY(half, SMALL, seed=1))


def test_a_run_beside_a_live_iterator() -> None:
    sampler = DPMSolver(SCHEDULE, steps=6, order=3)
    want, other = sampler(half, SMALL, seed=1), sampler(half, SMALL, seed=2)
    seen = []
    for step in sampler.iterate(half, SMALL, seed=1):
        assert torch.equal(sampler(half, SMALL, seed=2), other)
        seen.append(step.x)
    assert torch.equal(seen[-1], want)
    assert torch.equal(sampler(half, SMALL, seed=2), other)
    assert torch.equal(seen[-1], want), "the last step's x is the caller's"


def test_what_a_callback_has_kept_stays() -> None:
    kept_steps = []
    sampler = DDIM(SCHEDULE, steps=3)
    want = sampler(half, SMALL, seed=1, callback=kept_steps.append)
    sampler(half, SMALL, seed=2, callback=lambda step: None)
    sampler(half, SMALL, seed=3)
    assert torch.equal(kept_steps[-1].x, want)


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_from_many_threads(prepared: bool) -> None:
    run = NOISY.prepare(half, SMALL) if prepared else lambda seed: NOISY(half, SMALL, seed=seed)
    want = [NOISY(half, SMALL, seed=seed) for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda seed: run(seed=seed), range(64)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": ({"x": torch.zeros(1, 4, 6)}, ValueError, "x must have"),
    "float64": ({"x": torch.zeros(SMALL).double()}, ValueError, "x is torch.float64"),
    "integers": ({"x": torch.zeros(SMALL).long()}, TypeError, "x must be"),
    "gradients": ({"x": torch.zeros(SMALL, requires_grad=True)}, ValueError, "x requires gradients"),
    "seed": ({"seed": 0.5}, TypeError, "seed"),
    "index": ({"index": -1}, ValueError, "index"),
    "out": ({"out": torch.zeros(2)}, ValueError, "out must"),
    "out-dtype": ({"out": torch.zeros(SMALL).double()}, TypeError, "out must"),
    "out-expanded": ({"out": torch.zeros(1, 1, 1).expand(SMALL)}, ValueError, "out is expanded"),
    "out-overlapping": ({"out": torch.zeros(9).as_strided(SMALL, (9, 1, 1))}, ValueError, "out overlaps itself"),
    "out-sparse": ({"out": torch.zeros(SMALL).to_sparse()}, TypeError, "out must be a dense tensor"),
    "keywords": ({"model_kwargs": [1]}, TypeError, "model_kwargs"),
    "others": ({"obs": 1}, TypeError, "no argument obs; did you mean model_kwargs="),
    "uncond": ({"uncond": {"c": 1}}, ValueError, "uncond"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_name_the_argument_and_spoil_nothing(name: str) -> None:
    options, error, message = BAD_CALLS[name]
    calls = []

    def counting(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return x * 0.5

    prepared = NOISY.prepare(counting, SMALL)
    with pytest.raises(error, match=message):
        prepared(**options)
    assert not calls
    assert torch.equal(prepared(seed=6), NOISY(half, SMALL, seed=6))


def test_what_cannot_be_prepared() -> None:
    with pytest.raises(TypeError, match="prepare takes no out"):
        NOISY.prepare(half, SMALL, out=torch.zeros(SMALL))
    with pytest.raises(ValueError, match="x requires gradients"):
        NOISY.prepare(half, torch.zeros(SMALL, requires_grad=True))
    with pytest.raises(TypeError, match="no argument stepz"):
        NOISY.prepare(half, SMALL, stepz=3)  # type: ignore[call-arg]


def test_in_and_out_of_inference_mode() -> None:
    want = NOISY(half, SMALL, seed=1)
    with torch.inference_mode():
        inside = NOISY.prepare(half, SMALL)
        assert torch.equal(NOISY(half, SMALL, seed=1), want)
    outside = NOISY.prepare(half, SMALL)
    with torch.inference_mode():
        assert torch.equal(outside(seed=1), want)
        result = inside(seed=1)
    assert torch.equal(inside(seed=1), want)
    result.add_(1)  # an ordinary tensor


def test_a_seed_is_drawn_only_for_noise() -> None:
    sampler = DDIM(SCHEDULE, steps=3)
    prepared = sampler.prepare(half, SMALL)
    torch.manual_seed(0)
    want = torch.get_rng_state()
    prepared(torch.zeros(SMALL))
    sampler(half, torch.zeros(SMALL))
    assert torch.equal(torch.get_rng_state(), want)
    assert not torch.equal(prepared(), prepared())


def test_memory_does_not_grow() -> None:
    """Over mixed shapes, of which there are more than workspaces are kept for."""
    samplers = [DDIM(SCHEDULE, steps=2), DDPM(SCHEDULE, steps=2)]
    shapes = [(1 + i % 3, 3, 4 + i) for i in range(12)]

    def sample(count: int) -> None:
        for i in range(count):
            samplers[i % 2](half, shapes[i % 12], seed=i)
            fastsample.ddim(half, shapes[i % 12], steps=2 + i % 3, schedule=SCHEDULE)

    sample(200)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    sample(1000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 100_000, "a workspace kept for every run would be some 5 MB"
    assert len(pool._pool.waiting) <= 8


def test_large_states_are_not_kept() -> None:
    def never_run() -> int:
        return len(getattr(pool._pool, "waiting", ()))

    found = []

    def in_thread() -> None:
        DDIM(SCHEDULE, steps=2)(half, (1, 17, 1024), seed=0)  # 68 KB
        found.append(never_run())
        DDIM(SCHEDULE, steps=2)(half, (1, 16, 1024), seed=0)
        found.append(never_run())

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert found == [0, 1]


def test_an_interrupted_run_spoils_no_later_one() -> None:
    def interrupted(x: Tensor, t: Tensor) -> Tensor:
        raise KeyboardInterrupt

    want = NOISY(half, SMALL, seed=1)
    with pytest.raises(KeyboardInterrupt):
        NOISY(interrupted, SMALL, seed=1)
    assert torch.equal(NOISY(half, SMALL, seed=1), want)


def test_the_model_is_asked_for_its_dtype_at_every_plain_run() -> None:
    net = nn.Conv1d(4, 4, 1).eval()
    seen = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return net(x)

    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        net.to(dtype)
        DDIM(SCHEDULE, steps=1)(watched, SMALL, seed=0)
    assert seen == [torch.float32, torch.bfloat16, torch.float32]


def made(**fields: Any) -> Sampler:
    return kept.sampler_of(DDIM, SCHEDULE, **fields)


SAME = {
    "ints": ({"steps": 5}, {"steps": 5}),
    "arrays": ({"timesteps": np.array([9, 5])}, {"timesteps": np.array([9, 5])}),
    "tensors": ({"timesteps": torch.tensor([9, 5])}, {"timesteps": torch.tensor([9, 5])}),
    "lists": ({"timesteps": [9, 5]}, {"timesteps": [9, 5]}),
    "ranges": ({"timesteps": range(5)}, {"timesteps": range(5)}),
    "thresholds": ({"clip": DynamicThreshold(0.9)}, {"clip": DynamicThreshold(0.9)}),
}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "steps": ({"steps": 5}, {"steps": 6}),
    "arrays": ({"timesteps": np.array([9, 5])}, {"timesteps": np.array([9, 6])}),
    "eta": ({"eta": 0.0}, {"eta": 0.5}),
    "thresholds": ({"clip": DynamicThreshold(0.9)}, {"clip": DynamicThreshold(0.8)}),
}


@pytest.mark.parametrize("name", SAME)
def test_functions_keep_their_sampler(name: str) -> None:
    first, second = SAME[name]
    assert made(**first) is made(**second)


@pytest.mark.parametrize("name", OTHERS)
def test_other_values_make_another_sampler(name: str) -> None:
    first, second = OTHERS[name]
    assert made(**first) is not made(**second)
    assert made(**first).table != made(**second).table


def test_an_array_that_changes_is_another() -> None:
    times = np.array([900, 500])
    first = made(timesteps=times)
    times[1] = 400
    assert made(timesteps=times).table.t.tolist() == [900, 400]
    assert first.table.t.tolist() == [900, 500]


def test_schedules_are_told_apart_by_identity() -> None:
    assert kept.sampler_of(DDIM, Schedule.linear(), steps=5) is not kept.sampler_of(DDIM, Schedule.linear(), steps=5)
    for T in (100, 200, 300):  # one that has gone leaves its address to others
        assert kept.sampler_of(DDIM, Schedule.linear(T), steps=2, timesteps="leading").table.t[0] == T // 2


@pytest.mark.parametrize("wrong", [True, 5.0, "5"], ids=["bool", "float", "str"])
def test_what_equals_a_kept_value_is_checked_all_the_same(wrong: Any) -> None:
    made(steps=5)
    made(steps=1)
    with pytest.raises(TypeError, match="steps must be an int"):
        made(steps=wrong)


def test_functions_are_not_kept() -> None:
    first = made(correct_x0=lambda x0, t: x0)
    assert first is not made(correct_x0=first.correct_x0)
    assert not any(first is one for one in kept._samplers.values())


def test_every_call_warns() -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match="multiplies the model's error"):
            fastsample.heun(half, torch.zeros(SMALL), steps=3, schedule=Schedule.cosine(), timesteps="linspace")


def test_no_more_than_64_are_kept() -> None:
    def many(offset: int) -> None:
        for i in range(100):
            made(eta=i / 200 + offset / 1000)

    threads = [threading.Thread(target=many, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept._samplers) <= 64
