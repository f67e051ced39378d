"""What a run lends to its model: what that does to it behind torch's back is mended before the next run, or noticed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import DDIM, DDPM, Batcher, Schedule
from fastsample.loop import pool

SHAPE = (2, 3, 4)
SAMPLER = DDIM(Schedule.linear(), steps=4)
GUIDED: dict[str, Any] = dict(guidance=2.0, uncond={}, guidance_interval=(0, 600))


def by_time(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.25 + t.reshape(-1, 1, 1) / 1024


def halves_times(x: Tensor, t: Tensor) -> Tensor:
    """Through .data, which counts no version."""
    time = t.clone()
    t.data.floor_divide_(2)
    return by_time(x, time)


def watch(step: object) -> None:
    pass


@pytest.mark.parametrize("options", [{}, {"callback": watch}, GUIDED], ids=["plain", "watched", "guided"])
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_times_that_a_model_changes_are_right_again_in_the_next_run(options: dict[str, Any], prepared: bool) -> None:
    want = SAMPLER(by_time, SHAPE, seed=1, **options)
    run = SAMPLER.prepare(halves_times, SHAPE, **options) if prepared else None
    for _ in range(3):
        got = run(seed=1) if run is not None else SAMPLER(halves_times, SHAPE, seed=1, **options)
        assert torch.equal(got, want)
        assert torch.equal(SAMPLER(by_time, SHAPE, seed=1, **options), want)


@pytest.mark.parametrize("options", [{}, GUIDED], ids=["plain", "guided"])
def test_times_in_other_memory_are_noticed(options: dict[str, Any]) -> None:
    """Of the last row alone: to look at all would cost a row 4 % of what it takes."""
    want = SAMPLER(by_time, SHAPE, seed=1, **options)

    def moves(x: Tensor, t: Tensor) -> Tensor:
        t.data = t.data // 2
        return by_time(x, t)

    with pytest.raises(ValueError, match="replaced the memory of its argument t"):
        SAMPLER(moves, SHAPE, seed=1, **options)
    assert torch.equal(SAMPLER(by_time, SHAPE, seed=1, **options), want)


def test_many_times_are_not_kept() -> None:
    """A thousand rows of a few samples are 8 KB a sample."""
    found = []

    def in_thread() -> None:
        for batch in (9, 8):
            DDPM(Schedule.linear())(lambda x, t: x * 0.5, (batch, 1), seed=0)
            found.append(len(getattr(pool._pool, "waiting", ())))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert found == [0, 1]


def test_times_of_another_shape_are_noticed() -> None:
    def reshapes(x: Tensor, t: Tensor) -> Tensor:
        t.data = t.data[:, None]
        return by_time(x, t)

    with pytest.raises(ValueError, match="replaced the memory of its argument t"):
        SAMPLER(reshapes, SHAPE, seed=1)


def replaces(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
    """Gives each of its arguments other memory."""
    x.data = x.data * 0.5
    t.data = t.data // 2
    if c is None:
        return x
    c.data = c.data + 1
    return x * 0.5 + c


def replaces_nothing(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
    return x * 0.5 if c is None else x * 0.25 + (c + 1)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_a_batch_keeps_its_memory(guided: bool) -> None:
    """Its times too, which the next call is given, and the keywords of every sample."""
    options: dict[str, Any] = {"guidance": 2.0, "uncond": {"c": torch.zeros(3, 1)}} if guided else {}
    got = []
    for model in (replaces, replaces_nothing):
        seen: list[list[int]] = []

        def watched(x: Tensor, t: Tensor, c: Tensor, model: Any = model, seen: list[list[int]] = seen) -> Tensor:
            seen.append(t.tolist())
            return model(x, t, c)

        batcher = Batcher(watched, SAMPLER, batch=2, **options)
        requests = [batcher.submit(SHAPE[1:], seed=1, index=i, c=torch.full((3, 1), 0.5 * i)) for i in range(3)]
        got.append(([request.result() for request in requests], seen))
    assert got[0][1] == got[1][1]
    assert all(torch.equal(one, other) for one, other in zip(got[0][0], got[1][0], strict=True))
