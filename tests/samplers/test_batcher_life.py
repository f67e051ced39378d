"""The Batcher where things go wrong: models that fail, Ctrl-C anywhere, many threads, models that call it."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import DDIM, Batcher, DPMSolver, Sampler
from fastsample.loop import places
from fastsample.samplers import batcher as batchers
from fastsample.samplers.batcher import Request
from support.batcher_runs import EVERYTHING, SCHEDULE, SHAPE, exact, plain, with_variance

SAMPLERS = [
    pytest.param(DDIM(SCHEDULE, steps=3, eta=1.0), exact, id="ddim"),
    pytest.param(DPMSolver(SCHEDULE, steps=4), exact, id="one-earlier-x0"),
    pytest.param(EVERYTHING, with_variance, id="everything"),
]


class Ctrl(BaseException):
    """In place of KeyboardInterrupt, which pytest takes for itself where a test leaks it."""


@functools.cache
def want(sampler: Sampler, model: Callable[..., Tensor], seed: int, backend: str | None = None) -> Tensor:
    return plain(sampler, model, seed, backend=backend)


def finish(
    batcher: Batcher,
    requests: list[Request],
    sampler: Sampler,
    model: Callable[..., Tensor],
    backend: str | None = None,
) -> None:
    """Runs the batcher to its end; every sample must have the bits of the plain sampler's."""
    while batcher.step():
        pass
    for seed, request in enumerate(requests):
        assert request.done and torch.equal(request.result(), want(sampler, model, seed, backend)), seed


def half_way(sampler: Sampler, model: Callable[..., Tensor], **options: Any) -> tuple[Batcher, list[Request]]:
    """Of two places one is a step before its end and the other before its beginning; a third request waits."""
    batcher = Batcher(model, sampler, batch=2, **options)
    requests = [batcher.submit(SHAPE, 0)]
    for _ in range(len(sampler.table) - 1):
        batcher.step()
    return batcher, [*requests, batcher.submit(SHAPE, 1), batcher.submit(SHAPE, 2)]


class Interrupt:
    """Raises Ctrl at one of the moments that Python's tracing sees in the Batcher's own code, counted from 0."""

    FILES = (batchers.__file__, places.__file__)

    def __init__(self, moment: int) -> None:
        self._left = moment

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in self.FILES:
            return None
        frame.f_trace_opcodes = True
        if event in ("line", "opcode"):
            self._left -= 1
            if self._left < 0:
                sys.settrace(None)
                raise Ctrl
        return self

    def strike(self, call: Callable[[], object]) -> bool:
        """Whether the call was interrupted before its end."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except Ctrl:
            return True
        finally:
            sys.settrace(before)
        return False


@pytest.mark.parametrize(("sampler", "model"), SAMPLERS)
def test_an_interruption_anywhere_in_a_step_changes_no_sample(sampler: Sampler, model: Callable[..., Tensor]) -> None:
    moment, struck = 0, True
    while struck:
        batcher, requests = half_way(sampler, model)
        struck = Interrupt(moment).strike(batcher.step)
        # Again where the first one struck, in what it left.
        Interrupt(moment // 2).strike(batcher.step)
        finish(batcher, requests, sampler, model)
        moment += 1 if sampler is EVERYTHING else 7
    assert moment > 100


def test_an_interruption_anywhere_in_a_submission_leaves_it_out_or_in() -> None:
    sampler = DDIM(SCHEDULE, steps=3, eta=1.0)
    moment, struck = 0, True
    while struck:
        batcher = Batcher(exact, sampler, batch=2)
        struck = Interrupt(moment).strike(lambda batcher=batcher: batcher.submit((9,), 7))  # type: ignore[misc]
        queued = batcher.step()
        assert queued in (0, 1)
        if queued == 0:  # the shape of a request that was never made binds nobody
            finish(batcher, [batcher.submit(SHAPE, seed) for seed in range(3)], sampler, exact)
        moment += 1
    assert queued == 1 and moment > 100


def test_an_interrupted_result_goes_on() -> None:
    sampler = DDIM(SCHEDULE, steps=3, eta=1.0)
    moment, struck = 0, True
    while struck:
        _, requests = half_way(sampler, exact)
        struck = Interrupt(moment).strike(requests[2].result)
        assert torch.equal(requests[2].result(), want(sampler, exact, 2))
        moment += 29
    assert moment > 1000


@pytest.mark.parametrize("fault", ["raises", "interrupts", "wrong-shape"])
@pytest.mark.parametrize(("sampler", "model"), SAMPLERS)
def test_a_failure_at_any_call_changes_no_sample(
    backend: str, sampler: Sampler, model: Callable[..., Tensor], fault: str
) -> None:
    total = 2 * len(sampler.table)  # more calls than three requests in two places need
    for failing in range(total):
        calls: list[int] = []

        def failing_once(x: Tensor, t: Tensor, failing: int = failing, calls: list[int] = calls) -> Tensor:
            calls.append(len(calls))
            if calls[-1] != failing:
                return model(x, t)
            if fault == "wrong-shape":
                return torch.zeros(1)
            raise Ctrl if fault == "interrupts" else RuntimeError("out of memory")

        batcher = Batcher(failing_once, sampler, batch=2, backend=backend)
        requests = [batcher.submit(SHAPE, seed) for seed in range(3)]
        with pytest.raises((Ctrl, RuntimeError, ValueError)):
            for _ in range(total + 1):
                batcher.step()
                assert len(calls) < total
            raise RuntimeError("the failing call was beyond the last")
        finish(batcher, requests, sampler, model, backend)


def test_a_request_that_cannot_enter_stays_and_the_others_are_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = DDIM(SCHEDULE, steps=3, eta=1.0)
    batcher, requests = half_way(sampler, exact)
    fill, faults = places.fill, [RuntimeError("once"), RuntimeError("twice")]

    def failing(*arguments: Any) -> None:
        fill(*arguments)
        if faults:
            raise faults.pop()

    monkeypatch.setattr(places, "fill", failing)
    for message in ("twice", "once"):
        with pytest.raises(RuntimeError, match=message):
            batcher.step()
        assert not any(request.done for request in requests)
    finish(batcher, requests, sampler, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["state", "cast"])
def test_requests_whose_input_is_written_begin_again(dtype: torch.dtype) -> None:
    sampler, calls = DDIM(SCHEDULE, steps=4, eta=1.0), [0]

    def spoils(x: Tensor, t: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 3:
            x.fill_(9.0)
            raise RuntimeError("too late")
        return exact(x, t)

    batcher = Batcher(spoils, sampler, batch=2, model_dtype=dtype)
    requests = [batcher.submit(SHAPE, seed) for seed in range(2)]
    with pytest.raises(RuntimeError, match="too late"):
        while batcher.step():
            pass
    while batcher.step():
        pass
    for seed, request in enumerate(requests):
        assert torch.equal(request.result(), plain(sampler, exact, seed, model_dtype=dtype))


def test_many_threads() -> None:
    sampler = DDIM(SCHEDULE, steps=3, eta=1.0)
    batcher, found, errors = Batcher(exact, sampler, batch=3), {}, []
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        try:
            start.wait()
            for seed in range(100 * thread, 100 * thread + 25):
                request = batcher.submit(SHAPE, seed)
                if seed % 3 == 0:
                    batcher.step()
                found[seed] = request.result()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(switch)
    assert not errors and len(found) == 200 and batcher.step() == 0
    assert all(torch.equal(sample, plain(sampler, exact, seed)) for seed, sample in found.items())


def test_first_requests_of_many_threads_agree_on_one_shape() -> None:
    for _ in range(20):
        batcher, start, taken = Batcher(exact, DDIM(SCHEDULE, steps=3), batch=2), threading.Barrier(4), []

        def work(i: int, batcher: Batcher = batcher, start: Any = start, taken: list[Request] = taken) -> None:
            start.wait()
            try:
                taken.append(batcher.submit((i + 1,), i))
            except ValueError as error:
                assert "first request" in str(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(taken) == 1 and taken[0].result().isfinite().all()


def test_a_request_is_taken_while_the_model_runs() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def waits(x: Tensor, t: Tensor) -> Tensor:
        inside.set()
        assert go_on.wait(60)
        return exact(x, t)

    sampler = DDIM(SCHEDULE, steps=2, eta=1.0)
    batcher = Batcher(waits, sampler, batch=2)
    requests = [batcher.submit(SHAPE, 0)]
    thread = threading.Thread(target=requests[0].result)
    thread.start()
    assert inside.wait(60)
    requests.append(batcher.submit(SHAPE, 1))
    go_on.set()
    thread.join(60)
    finish(batcher, requests, sampler, exact)


@pytest.mark.parametrize("method", ["submit", "step", "result"])
def test_a_model_that_calls_its_batcher_is_told(method: str) -> None:
    sampler, other = DDIM(SCHEDULE, steps=3, eta=1.0), []
    fault = [True]

    def within(x: Tensor, t: Tensor) -> Tensor:
        other.append(Batcher(exact, sampler, batch=1).submit(SHAPE, 5).result())  # another one is free
        if fault:
            fault.clear()
            {"submit": lambda: batcher.submit(SHAPE, 1), "step": batcher.step, "result": requests[1].result}[method]()
        return exact(x, t)

    batcher = Batcher(within, sampler, batch=2)
    requests = [batcher.submit(SHAPE, seed) for seed in range(3)]
    with pytest.raises(RuntimeError, match="its model cannot use it"):
        batcher.step()
    finish(batcher, requests, sampler, exact)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_nan_in_idle_places_reaches_nobody(backend: str, rescale: float) -> None:
    def explodes_on_zeros(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return torch.where((x == 0) | x.isnan(), float("nan"), exact(x, t, c))

    sampler = DPMSolver(SCHEDULE, steps=4)
    common: dict[str, Any] = dict(guidance=2.0, guidance_rescale=rescale, backend=backend)
    batcher = Batcher(explodes_on_zeros, sampler, batch=3, uncond={"c": 0.125}, **common)
    for seed in range(3):
        got = batcher.submit(SHAPE, seed, c=0.5).result()
        cond, uncond = ({"c": torch.tensor([c])} for c in (0.5, 0.125))
        assert torch.equal(got, sampler(exact, (1, *SHAPE), seed=seed, cond=cond, uncond=uncond, **common)[0])


def test_numpy_numbers_and_places() -> None:
    sampler = DDIM(SCHEDULE, steps=3, eta=1.0)
    batcher = Batcher(exact, sampler, batch=np.int64(2))  # type: ignore[arg-type]
    together = sampler(exact, (6, *SHAPE), seed=7, index=3)
    shapes = [SHAPE, list(SHAPE), np.array(SHAPE), torch.tensor(SHAPE), tuple(np.int32(n) for n in SHAPE), SHAPE]
    indices = [3, np.int64(4), np.uint8(5), torch.tensor(6), np.array(7), 8]
    seeds = [7, np.int64(7), torch.tensor(7), np.array(7), 2**64 + 7, 7]
    requests = [batcher.submit(*one) for one in zip(shapes, seeds, indices, strict=True)]  # type: ignore[arg-type]
    for i, request in enumerate(requests):
        assert torch.equal(request.result(), together[i])


def test_a_keyword_of_a_kind_of_its_own_is_copied_at_submission() -> None:
    class Refusing(Tensor):
        """Its values can be read, and not much else."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not Tensor.__setitem__
            return super().__torch_function__(func, types, args, kwargs or {})

    sampler = DDIM(SCHEDULE, steps=3)
    batcher = Batcher(exact, sampler, batch=1)
    got = batcher.submit(SHAPE, 0, c=torch.full((1,), 0.5)[0].as_subclass(Refusing)).result()
    assert type(got) is Tensor and torch.equal(got, plain(sampler, exact, 0, 0.5))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        pytest.param({"seed": [1]}, TypeError, "seed must be", id="seeds"),
        pytest.param({"seed": torch.tensor([1])}, TypeError, "seed must be", id="seed-tensor"),
        pytest.param({"seed": True}, TypeError, "seed must be", id="seed-bool"),
        pytest.param({"index": [1]}, TypeError, "index must be", id="places"),
        pytest.param({"index": -1}, ValueError, "index must", id="place-below-0"),
        pytest.param({"index": 1.0}, TypeError, "index must be", id="place-float"),
        pytest.param({"c": torch.tensor(1.0, device="meta")}, TypeError, "c must be", id="keyword-without-values"),
        pytest.param({"c": torch.zeros(2).to_sparse()}, TypeError, "c must be", id="sparse-keyword"),
    ],
)
def test_bad_requests_leave_nothing(given: dict[str, Any], error: type[Exception], message: str) -> None:
    batcher = Batcher(exact, DDIM(SCHEDULE, steps=3), batch=2)
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        batcher.submit(SHAPE, **{"c": 0.5, **given})
    assert batcher.step() == 0 and torch.equal(torch.get_rng_state(), state)
    batcher.submit((9,), 0).result()


@pytest.mark.parametrize("batch", [True, 2.5, "2", None, np.float64(2), 0, np.int64(-1)], ids=repr)
def test_bad_batches(batch: Any) -> None:
    with pytest.raises(ValueError, match="batch must be an int of at least 1"):
        Batcher(exact, DDIM(SCHEDULE, steps=3), batch=batch)
