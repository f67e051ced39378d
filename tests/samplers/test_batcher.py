"""The continuous batcher: the bits of every request whatever else runs, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastsample
from fastsample import (
    DDIM,
    DDPM,
    LCM,
    Batcher,
    Consistency,
    DDIMInverse,
    DPMSolver,
    DynamicThreshold,
    Euler,
    Guidance,
    Heun,
    Sampler,
    Table,
)
from fastsample.samplers.batcher import Request
from support.batcher_runs import EVERYTHING, SCHEDULE, SHAPE, HandMade, exact, plain, with_variance
from support.levels import LEVELS

SAMPLERS = [
    pytest.param(DDIM(SCHEDULE, steps=5, eta=1.0, clip=1.0), exact, id="ddim-eta1"),
    pytest.param(DDIM(SCHEDULE, steps=4, clip=DynamicThreshold(0.9, max=2.0)), exact, id="ddim-thresholded"),
    pytest.param(DDPM(SCHEDULE, steps=6, variance="learned_range"), with_variance, id="ddpm-learned-range"),
    pytest.param(DPMSolver(SCHEDULE, steps=16, order=2), exact, id="dpm-solver-2"),
    pytest.param(DPMSolver(SCHEDULE, steps=16, order=3), exact, id="dpm-solver-3"),
    pytest.param(Heun(SCHEDULE, steps=4), exact, id="heun"),
    pytest.param(Euler(steps=4, prediction="flow"), exact, id="flow"),
    pytest.param(LCM(SCHEDULE, steps=4), exact, id="lcm"),
    pytest.param(Consistency(sigmas=[80.0, 5.0, 0.5]), exact, id="consistency"),
    pytest.param(EVERYTHING, with_variance, id="everything"),
]


def staggered(batcher: Batcher, seeds: list[int], gap: int = 2) -> list[Request]:
    """Requests with keyword c = seed / 10 that arrive `gap` steps after one another; all finished."""
    requests = []
    for seed in seeds:
        requests.append(batcher.submit(SHAPE, seed, c=seed / 10))
        for _ in range(gap):
            batcher.step()
    while batcher.step():
        pass
    return requests


@pytest.mark.parametrize(("sampler", "model"), SAMPLERS)
def test_every_result_has_the_bits_of_the_plain_sampler(
    backend: str, sampler: Sampler, model: Callable[..., Tensor]
) -> None:
    batcher = Batcher(model, sampler, batch=3, backend=backend)
    for request, seed in zip(staggered(batcher, [3, 11, 7, 2, 5]), [3, 11, 7, 2, 5], strict=True):
        assert request.done
        assert torch.equal(request.result(), plain(sampler, model, seed, seed / 10, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("sampler", "model"), [SAMPLERS[0], SAMPLERS[-1]])
def test_half_precision_models(
    backend: str, sampler: Sampler, model: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    def half(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert x.dtype == dtype
        return model(x, t, c)

    batcher = Batcher(half, sampler, batch=2, model_dtype=dtype, backend=backend)
    for request, seed in zip(staggered(batcher, [4, 9, 1]), [4, 9, 1], strict=True):
        want = plain(sampler, half, seed, seed / 10, model_dtype=dtype, backend=backend)
        assert request.result().dtype == torch.float32 and torch.equal(request.result(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize(("sampler", "model"), [SAMPLERS[0], SAMPLERS[-1]])
def test_guidance(
    backend: str, sampler: Sampler, model: Callable[..., Tensor], rescale: float, dtype: torch.dtype
) -> None:
    common = dict(guidance=2.5, guidance_rescale=rescale, model_dtype=dtype, backend=backend)
    batcher = Batcher(model, sampler, batch=2, uncond={"c": 0.125}, **common)  # type: ignore[arg-type]
    for request, seed in zip(staggered(batcher, [4, 9, 1]), [4, 9, 1], strict=True):
        cond, uncond = ({"c": torch.tensor([c])} for c in (seed / 10, 0.125))
        want = sampler(model, (1, *SHAPE), seed=seed, cond=cond, uncond=uncond, **common)  # type: ignore[arg-type]
        assert torch.equal(request.result(), want[0])


def test_a_guidance_object_is_its_numbers() -> None:
    sampler, model = EVERYTHING, with_variance
    numbers = Batcher(model, sampler, batch=2, uncond={"c": 0.125}, guidance=2.5, guidance_rescale=0.7)
    whole = Batcher(model, sampler, batch=2, uncond={"c": 0.125}, guidance=Guidance(weight=2.5, rescale=0.7))
    for one, other in zip(staggered(numbers, [4, 9]), staggered(whole, [4, 9]), strict=True):
        assert torch.equal(one.result(), other.result())


@pytest.mark.parametrize(("sampler", "model"), [SAMPLERS[0], SAMPLERS[2], SAMPLERS[4], SAMPLERS[-1]])
@settings(max_examples=25, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 3), st.integers(-(2**63), 2**64 - 1)), min_size=1, max_size=9),
    batch=st.integers(1, 4),
)
def test_any_order_of_arrival(
    sampler: Sampler, model: Callable[..., Tensor], arrivals: list[tuple[int, int]], batch: int
) -> None:
    batcher = Batcher(model, sampler, batch=batch)
    requests = []
    for steps, seed in arrivals:
        for _ in range(steps):
            batcher.step()
        requests.append(batcher.submit(SHAPE, seed))
    while batcher.step():
        pass
    for request, (_, seed) in zip(requests, arrivals, strict=True):
        assert torch.equal(request.result(), plain(sampler, model, seed))


# Where two threads share a matrix product, its rounding depends on the row.
def test_a_real_model_alone_and_in_company(one_thread: None) -> None:
    model = fastsample.zoo.digits()
    sampler = DDPM(model.schedule, steps=6, variance="learned_range", clip=1.0)

    def batcher() -> Batcher:
        return Batcher(model, sampler, batch=3, guidance=2.0, uncond={"y": 10})

    def in_a_full_batch(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The same call with as many rows as the batcher makes: with others the network rounds differently."""
        three = [one.repeat_interleave(3, 0) for one in (x, t, y)]
        return model(*three)[::3]

    alone = [batcher().submit((1, 28, 28), seed, y=seed % 10).result() for seed in range(5)]
    shared = batcher()
    company = []
    for seed in range(5):
        company.append(shared.submit((1, 28, 28), seed, y=torch.tensor(seed % 10)))
        shared.step()
    for seed, request in enumerate(company):
        assert torch.equal(request.result(), alone[seed])
        y, none = torch.tensor([seed % 10]), torch.tensor([10])
        want = sampler(in_a_full_batch, (1, 1, 28, 28), seed=seed, guidance=2.0, cond={"y": y}, uncond={"y": none})
        assert torch.equal(request.result(), want[0])


def test_the_model_sees_full_batches_of_finite_data_at_times_of_their_own() -> None:
    seen: list[tuple[tuple[int, ...], list[int], list[float]]] = []

    def spy(x: Tensor, t: Tensor, c: Tensor, shared: str) -> Tensor:
        assert shared == "all" and x.isfinite().all() and t.dtype == torch.int64
        seen.append((tuple(x.shape), t.tolist(), c.tolist()))
        return exact(x, t)

    batcher = Batcher(spy, DDIM(SCHEDULE, timesteps=[900, 500, 100]), batch=2, model_kwargs={"shared": "all"})
    first = batcher.submit(SHAPE, 0, c=0.5)
    assert batcher.step() == 1
    second = batcher.submit(SHAPE, 1, c=0.25)
    third = batcher.submit(SHAPE, 2, c=0.125)
    left = [batcher.step() for _ in range(5)]
    assert left == [3, 2, 1, 1, 0] and first.done and second.done and third.done
    times, c = zip(*[(t, c) for _, t, c in seen], strict=True)
    assert {shape for shape, _, _ in seen} == {(2, *SHAPE)}
    assert list(times) == [[900, 100], [500, 900], [100, 500], [900, 100], [500, 100], [100, 100]]
    assert list(c) == [[0.5, 0.5], *[[0.5, 0.25]] * 2, *[[0.125, 0.25]] * 3]
    assert batcher.step() == 0 and len(seen) == 6, "with nothing to do the model is not called"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_places_that_nobody_has_hold_zeros(backend: str, dtype: torch.dtype) -> None:
    inputs: list[Tensor] = []

    def explodes(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        inputs.append(x.clone())
        return torch.full_like(x, float("inf"))

    sampler = HandMade(Table([2, 1, 0], a=1.0, d=1.0))
    batcher = Batcher(explodes, sampler, batch=3, model_dtype=dtype, guidance=2.0, uncond={"c": 0.0}, backend=backend)
    both = [batcher.submit(SHAPE, seed, c=0.5) for seed in range(2)]
    assert all(not request.result().isfinite().any() for request in both)
    batcher.submit(SHAPE, 2, c=0.5).result()
    first, second = (torch.cat([x.unflatten(0, (2, 3)) for x in part]) for part in (inputs[:3], inputs[3:]))
    assert (first[:, 2] == 0).all() and (second[:, 1:] == 0).all()
    assert first[:2, :2].isfinite().all() and second[:2, 0].isfinite().all()


def test_result_runs_the_batcher_and_stays() -> None:
    batcher = Batcher(exact, DDIM(SCHEDULE, steps=4), batch=1)
    first, second = batcher.submit(SHAPE, 0), batcher.submit(SHAPE, 1)
    later = second.result()
    assert first.done and later.shape == SHAPE
    kept = later.clone()
    batcher.submit(SHAPE, 2).result()
    assert second.result() is later and torch.equal(later, kept)


def test_results_are_ordinary_tensors() -> None:
    weight = nn.Parameter(torch.tensor(0.5))
    with torch.inference_mode():
        batcher = Batcher(lambda x, t: x * weight, DDIM(SCHEDULE, steps=3, eta=1.0), batch=2)
        got = batcher.submit(SHAPE, 3).result()
    assert not got.is_inference() and not got.requires_grad
    with torch.device("meta"):
        batcher = Batcher(lambda x, t: x * 0.5, DDIM(SCHEDULE, steps=3, eta=1.0), batch=2)
        assert torch.equal(batcher.submit(SHAPE, 3).result(), got)
    assert torch.is_grad_enabled()


def test_keywords_are_read_at_submission() -> None:
    batcher = Batcher(exact, DDIM(SCHEDULE, steps=3), batch=1)
    c = torch.tensor(0.5)
    first, second = batcher.submit(SHAPE, 0, c=c), batcher.submit(SHAPE, 1, c=c)
    c += 1
    sampler = DDIM(SCHEDULE, steps=3)
    assert torch.equal(first.result(), plain(sampler, exact, 0, 0.5))
    assert torch.equal(second.result(), plain(sampler, exact, 1, 0.5))


@pytest.mark.parametrize("fault", ["raises", "wrong-shape", "no-variance"])
def test_a_model_that_fails_leaves_requests_where_they_were(backend: str, fault: str) -> None:
    calls: list[int] = []

    def sometimes(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(calls))
        if len(calls) % 3:
            return with_variance(x, t)
        if fault == "raises":
            raise RuntimeError("out of memory")
        return torch.zeros(1) if fault == "wrong-shape" else exact(x, t)

    batcher = Batcher(sometimes, EVERYTHING, batch=2, backend=backend)
    requests = [batcher.submit(SHAPE, seed) for seed in range(3)]
    failed = 0
    while not all(request.done for request in requests):
        try:
            batcher.step()
        except (RuntimeError, ValueError):
            failed += 1
    assert failed >= 3
    for seed, request in enumerate(requests):
        assert torch.equal(request.result(), plain(EVERYTHING, with_variance, seed, backend=backend))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"batch": 0}, ValueError, "batch", id="batch"),
        pytest.param({"batch": 2.5}, ValueError, "batch", id="fraction"),
        pytest.param({"sampler": "ddim"}, TypeError, "sampler", id="sampler"),
        pytest.param({"sampler": DDIM(SCHEDULE, correct_x0=lambda x0, t: x0)}, ValueError, "correct_x0", id="correct"),
        pytest.param({"sampler": DDIMInverse(SCHEDULE)}, ValueError, "starts from noise", id="inversion"),
        pytest.param({"model": 3}, TypeError, "callable", id="model"),
        pytest.param({"guidance": 2.0}, ValueError, "uncond", id="no-uncond"),
        pytest.param({"guidance": "2"}, TypeError, "guidance", id="guidance-text"),
        pytest.param({"guidance": float("nan"), "uncond": {}}, ValueError, "finite", id="guidance-nan"),
        pytest.param(
            {"guidance": Guidance(weight=2.0, interval=(0, 9)), "uncond": {}}, ValueError, "interval", id="when"
        ),
        pytest.param({"guidance": Guidance(weight=[2.0, 3.0]), "uncond": {}}, TypeError, "guidance", id="weights"),
        pytest.param({"guidance_rescale": 2.0}, ValueError, "guidance_rescale", id="rescale"),
        pytest.param({"guidance": 2.0, "uncond": 3}, TypeError, "mapping", id="uncond"),
        pytest.param({"model_kwargs": 3}, TypeError, "mapping", id="model-kwargs"),
        pytest.param({"model_dtype": torch.int64}, TypeError, "model_dtype", id="dtype"),
        pytest.param({"backend": "nonsense"}, ValueError, "nonsense", id="backend"),
    ],
)
def test_bad_batchers(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Batcher(**{"model": exact, "sampler": DDIM(SCHEDULE, steps=3), "batch": 2, **arguments})


BAD_REQUESTS = [
    pytest.param(((), 0), {"c": 0.5}, ValueError, "shape", id="no-axis"),
    pytest.param(((2, 0, 3), 0), {"c": 0.5}, ValueError, "shape", id="zero"),
    pytest.param((5, 0), {"c": 0.5}, TypeError, "shape", id="number"),
    pytest.param((SHAPE, 0.5), {"c": 0.5}, TypeError, "seed", id="fractional-seed"),
    pytest.param((SHAPE, [1]), {"c": 0.5}, TypeError, "seed", id="seeds"),
    pytest.param((SHAPE, 0), {"c": None}, TypeError, "c must be a tensor or a number", id="none"),
    pytest.param((SHAPE, 0), {"c": "cat"}, TypeError, "model_kwargs", id="text"),
    pytest.param((SHAPE, 0), {"c": 0.5, "d": 1}, ValueError, "keywords", id="unknown"),
    pytest.param((SHAPE, 0), {}, ValueError, "keywords", id="missing"),
    pytest.param((SHAPE, 0), {"c": torch.zeros(2)}, ValueError, "c must be", id="keyword-shape"),
]
LATER = [
    pytest.param(((2, 5, 4), 0), {"c": 0.5}, ValueError, "first request", id="other-shape"),
    pytest.param((SHAPE, 0), {"c": 0.5j}, ValueError, "c must be torch.float32", id="keyword-dtype"),
]


@pytest.mark.parametrize(("where", "cond", "error", "message"), [*BAD_REQUESTS, *LATER])
def test_bad_requests_after_a_good_one(
    where: tuple[Any, Any], cond: dict[str, Any], error: type[Exception], message: str
) -> None:
    batcher = Batcher(exact, DDIM(SCHEDULE, steps=3), batch=2)
    good = batcher.submit(SHAPE, 1, c=0.5)
    with pytest.raises(error, match=message):
        batcher.submit(*where, **cond)
    assert batcher.step() == 1
    assert torch.equal(good.result(), plain(DDIM(SCHEDULE, steps=3), exact, 1, 0.5))


@pytest.mark.parametrize(("where", "cond", "error", "message"), BAD_REQUESTS)
def test_bad_first_requests(where: tuple[Any, Any], cond: dict[str, Any], error: type[Exception], message: str) -> None:
    batcher = Batcher(exact, DDIM(SCHEDULE, steps=3), batch=2, guidance=2.0, uncond={"c": 0.25})
    with pytest.raises(error, match=message):
        batcher.submit(*where, **cond)
    assert batcher.step() == 0
    assert batcher.submit(SHAPE, 1, c=0.5).result().isfinite().all()


def test_numbers_fit_the_dtype_of_the_first_request() -> None:
    batcher = Batcher(exact, DDIM(SCHEDULE, steps=3), batch=2)
    batcher.submit(SHAPE, 0, c=0.5)
    whole = batcher.submit(SHAPE, 1, c=1)
    assert torch.equal(whole.result(), plain(DDIM(SCHEDULE, steps=3), exact, 1, 1.0))


@pytest.mark.skipif(not LEVELS, reason="the reference allocates")
def test_no_tensor_is_allocated_by_a_step() -> None:
    """But for finished samples and what the model makes; counted by what torch is asked for between model calls.

    An alias that the model is lent (detach) has no memory of its own.
    """
    fixed = torch.zeros(4, 4, 5, 3)
    operations: list[list[str]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            operations[-1].append(str(func))
            return func(*args, **(kwargs or {}))

    def free(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        operations.append([])
        return fixed

    batcher = Batcher(
        free, EVERYTHING, batch=2, guidance=2.0, uncond={"c": 0.5}, model_dtype=torch.bfloat16, backend="cpu"
    )
    batcher.submit(SHAPE, 0, c=0.5)
    batcher.submit(SHAPE, 1, c=0.5)
    operations.append([])
    with Record():
        while batcher.step():
            pass
    in_loop = {operation for step in operations[2:-1] for operation in step}
    assert in_loop == {"aten.index_select.out", "aten.copy_.default", "aten.detach.default"}
