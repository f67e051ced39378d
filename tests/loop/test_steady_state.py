"""Memory in the middle of a run, counted and not timed: rows allocate no tensor and leave no Python object behind."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from fastsample import DDIM, DDPM, DPMSolver, DynamicThreshold, Euler, EulerAncestral, Sampler, Schedule, Step
from fastsample.ops.backend import cpu_module
from support import ahead

_cpu = cpu_module()

SHAPE = (2, 3, 40, 33)
SCHEDULE = Schedule.linear()
WARM = 3  # rows before which buffers may still be made

pytestmark = pytest.mark.skipif(_cpu is None, reason="the reference backend allocates: that is what kernels are for")


@pytest.fixture(autouse=True)
def nothing_beside_it() -> None:
    """What other threads keep would be counted too."""
    ahead.wait()


class Free:
    """A model that returns the same tensor at every call and marks the calls for the profiler."""

    def __init__(self, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> None:
        self.outputs = {n: torch.zeros(n, *shape[1:], dtype=dtype) for n in (shape[0], 2 * shape[0])}
        self.on_call: Callable[[], None] = lambda: None

    def __call__(self, x: Tensor, t: Tensor, **_: Any) -> Tensor:
        with record_function("model call"):
            self.on_call()
            return self.outputs[len(x)]


def allocations(run: Callable[[], object]) -> list[tuple[str, int]]:
    """(operator, bytes) of every tensor storage that is made after the first rows of the run and before its last."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.events()
    calls = sorted(event.time_range.start for event in events if event.name == "model call")
    assert len(calls) >= 2 * WARM, "nothing in the middle"
    return [
        (event.name, event.self_cpu_memory_usage)
        for event in events
        if event.self_cpu_memory_usage > 0 and calls[WARM] <= event.time_range.start <= calls[-1]
    ]


DOUBLED = (2, 6, 40, 33)
GUIDED: dict[str, Any] = dict(guidance=3.0, uncond={})


def strided() -> Free:
    model = Free()
    model.outputs = {n: one.to(memory_format=torch.channels_last) for n, one in model.outputs.items()}
    return model


# Each a sampler, what its model is and the options of a run.
RUNS: dict[str, tuple[Callable[[], Sampler], Callable[[], Free], dict[str, Any]]] = {
    "ddim": (lambda: DDIM(SCHEDULE, steps=10), Free, {}),
    "ddim-noise": (lambda: DDIM(SCHEDULE, steps=10, eta=1.0), Free, {}),
    "ddim-noise-clip": (lambda: DDIM(SCHEDULE, steps=10, eta=1.0, clip=1.0), Free, {}),
    "ddim-threshold": (lambda: DDIM(SCHEDULE, steps=10, clip=DynamicThreshold()), Free, {}),
    "ddim-from-the-middle": (lambda: DDIM(SCHEDULE, steps=20), Free, {"start_step": 8}),
    "guided": (lambda: DDIM(SCHEDULE, steps=10), Free, GUIDED),
    "guided-each": (lambda: DDIM(SCHEDULE, steps=10, eta=1.0), Free, {**GUIDED, "guidance": [1.0, 7.5]}),
    "guided-rescaled": (lambda: DDIM(SCHEDULE, steps=10), Free, {**GUIDED, "guidance_rescale": 0.7}),
    "guided-at-times": (lambda: DDIM(SCHEDULE, steps=10), Free, {**GUIDED, "guidance_interval": (300, 600)}),
    "guided-half": (
        lambda: DDIM(SCHEDULE, steps=10),
        lambda: Free(dtype=torch.bfloat16),
        {**GUIDED, "model_dtype": torch.bfloat16},
    ),
    "dpm-solver": (lambda: DPMSolver(SCHEDULE, steps=10), Free, {}),
    "dpm-solver-3-guided": (lambda: DPMSolver(SCHEDULE, steps=16, order=3), Free, GUIDED),
    "half": (
        lambda: DDIM(SCHEDULE, steps=10, eta=1.0),
        lambda: Free(dtype=torch.bfloat16),
        {"model_dtype": torch.bfloat16},
    ),
    "learned": (lambda: DDPM(SCHEDULE, steps=10, variance="learned_range"), lambda: Free(DOUBLED), {}),
    "learned-half": (
        lambda: DDPM(SCHEDULE, steps=10, variance="learned_range", clip=1.0),
        lambda: Free(DOUBLED, torch.float16),
        {"model_dtype": torch.float16},
    ),
    "scaled-input": (lambda: Euler(SCHEDULE, steps=10), Free, {}),
    "scaled-input-half-guided": (
        lambda: EulerAncestral(SCHEDULE, steps=10),
        lambda: Free(dtype=torch.float16),
        {**GUIDED, "model_dtype": torch.float16},
    ),
    "float64-output": (lambda: DDIM(SCHEDULE, steps=10), lambda: Free(dtype=torch.float64), {}),
    "strided-output": (lambda: DDIM(SCHEDULE, steps=10), strided, {}),
    "generator": (lambda: DDIM(SCHEDULE, steps=10, eta=1.0), Free, {"noise": torch.Generator()}),
    "inpainting": (
        lambda: DDIM(SCHEDULE, steps=10, eta=1.0),
        Free,
        {"mask": torch.ones(SHAPE[2:]).tril(), "known": torch.zeros(SHAPE)},
    ),
    "watched": (lambda: DDIM(SCHEDULE, steps=10, eta=1.0), Free, {"callback": lambda step: None}),
    "watched-half-scaled": (
        lambda: Euler(SCHEDULE, steps=10),
        lambda: Free(dtype=torch.bfloat16),
        {"callback": lambda step: None, "model_dtype": torch.bfloat16},
    ),
}


def start(options: dict[str, Any]) -> Any:
    return torch.zeros(SHAPE) if "start_step" in options else SHAPE


@pytest.mark.parametrize("name", RUNS)
def test_no_tensor_storage_is_made_once_a_run_is_under_way(name: str) -> None:
    make, model_of, options = RUNS[name]
    sampler, model = make(), model_of()
    assert allocations(lambda: sampler(model, start(options), backend="cpu", **options)) == []


def test_the_count_sees_what_a_model_makes() -> None:
    model = Free()
    model.on_call = lambda: torch.zeros(100)  # type: ignore[assignment, return-value]
    made = allocations(lambda: DDIM(SCHEDULE, steps=10)(model, SHAPE))
    assert [size for _, size in made] == [400] * (10 - WARM - 1)


def test_no_tensor_storage_is_made_between_steps_of_an_iterator() -> None:
    def run() -> None:
        for _ in DDIM(SCHEDULE, steps=10, eta=1.0).iterate(Free(), SHAPE):
            pass

    assert allocations(run) == []


ROWS = 999
# The interpreter itself keeps some objects (free lists, caches of attributes): far fewer than one per row or run.
FEW = 100


LONG_RUNS = (
    *("ddim", "ddim-noise-clip", "ddim-threshold", "guided-half", "guided-rescaled", "dpm-solver-3-guided"),
    *("learned-half", "scaled-input-half-guided", "strided-output", "generator", "inpainting", "watched-half-scaled"),
)


@pytest.mark.parametrize("name", LONG_RUNS)
def test_no_python_object_stays_behind_over_a_thousand_rows(name: str) -> None:
    make, model_of, options = RUNS[name]
    sampler = dataclasses.replace(make(), steps=ROWS)  # type: ignore[type-var]
    model, blocks, rows = model_of(), [], 0

    def count() -> None:
        nonlocal rows
        rows += 1
        if rows in (100, ROWS):
            gc.collect()
            blocks.append(sys.getallocatedblocks())

    model.on_call = count
    sampler(model, SHAPE, backend="cpu", **options)
    assert rows == ROWS and blocks[1] - blocks[0] <= FEW


def test_the_count_sees_what_a_model_keeps() -> None:
    model, kept, blocks = Free(), [], []

    def keep() -> None:
        kept.append(object())
        if len(kept) in (100, ROWS):
            blocks.append(sys.getallocatedblocks())

    model.on_call = keep
    DDIM(SCHEDULE, steps=ROWS)(model, SHAPE)
    assert blocks[1] - blocks[0] >= ROWS - 100


def test_no_bytes_stay_behind_over_a_thousand_rows() -> None:
    sampler, sizes, rows = DDIM(SCHEDULE, steps=1000, eta=1.0), [], 0

    def count(step: Step) -> None:
        nonlocal rows
        rows += 1
        if rows in (100, 999):
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        sampler(Free(), SHAPE, callback=count)
    finally:
        tracemalloc.stop()
    assert sizes[1] - sizes[0] < 4096, "less than five bytes a row"


def test_runs_leave_nothing_behind() -> None:
    sampler, model = DDIM(SCHEDULE, steps=4, eta=1.0, clip=1.0), Free((2, 3, 4))

    def blocks_after(runs: int) -> int:
        for _ in range(runs):
            sampler(model, (2, 3, 4), **GUIDED)
        gc.collect()
        return sys.getallocatedblocks()

    blocks = [blocks_after(500) for _ in range(4)]
    # Caches fill up over the first runs; one object per run would be 500 every time.
    assert min(after - before for before, after in itertools.pairwise(blocks)) <= FEW
