"""A callback that raises Stop ends the run after that row, which returns the sample so far."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import DDIM, DPMSolver, Heun, Schedule, Step, Stop, interpolate

SHAPE = (2, 3, 5)
SAMPLERS = {
    "ddim": DDIM(Schedule.linear(), steps=5, eta=1.0),
    "multistep": DPMSolver(Schedule.linear(), steps=5),
    "heun": Heun(Schedule.linear(), steps=3),
}
DDIM5 = SAMPLERS["ddim"]
KINDS = {"state": lambda step: Stop(), "class": lambda step: Stop, "x0": lambda step: Stop(step.x0)}


class Model:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return x * 0.5 - 0.1


def after(row: int, kind: str = "state") -> Callable[[Step], None]:
    def callback(step: Step) -> None:
        if step.index == row:
            raise KINDS[kind](step)

    return callback


def wanted(sampler: Any, row: int, kind: str, **options: Any) -> Tensor:
    """By the generator, which a break ends."""
    for step in sampler.iterate(Model(), SHAPE, seed=3, **options):
        if step.index == row:
            break
    sample: Tensor = step.x0 if kind == "x0" else step.x
    return sample


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [0, 2, 4])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_ends_after_the_row(name: str, row: int, kind: str, prepared: bool) -> None:
    sampler, model = SAMPLERS[name], Model()
    if prepared:
        run = sampler.prepare(model, SHAPE, callback=after(row, kind))
        got, again = run(seed=3), run(seed=3)
        assert torch.equal(got, again)
        assert run(seed=4).data_ptr() != got.data_ptr()
    else:
        got = sampler(model, SHAPE, seed=3, callback=after(row, kind))
    assert model.calls == (row + 1) * (3 if prepared else 1)
    assert torch.equal(got, wanted(sampler, row, kind))


def test_the_rest_of_the_run_can_follow() -> None:
    begun = DDIM5(Model(), SHAPE, seed=3, callback=after(1))
    assert torch.equal(DDIM5(Model(), begun, seed=3, start_step=2), DDIM5(Model(), SHAPE, seed=3))


def test_out_and_decode_have_the_sample_so_far() -> None:
    out, want = torch.zeros(SHAPE), wanted(DDIM5, 2, "x0")
    assert DDIM5(Model(), SHAPE, seed=3, callback=after(2, "x0"), out=out) is out
    assert torch.equal(out, want)
    assert torch.equal(DDIM5(Model(), SHAPE, seed=3, callback=after(2, "x0"), decode=lambda x: x * 2), want * 2)


def test_what_the_callback_wrote_counts() -> None:
    def callback(step: Step) -> None:
        step.x.fill_(7)
        raise Stop

    assert torch.equal(DDIM5(Model(), SHAPE, seed=3, callback=callback), torch.full(SHAPE, 7.0))


@pytest.mark.parametrize("kind", KINDS)
def test_with_gradients(kind: str) -> None:
    x = torch.ones(SHAPE, requires_grad=True)
    sampler = DDIM(Schedule.linear(), steps=4)
    got = sampler(Model(), x, callback=after(1, kind))
    # Everything in this run is linear in x.
    with torch.no_grad():
        slope = sampler(Model(), x + 1, callback=after(1, kind)) - sampler(Model(), x, callback=after(1, kind))
    got.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, slope, rtol=1e-4, atol=1e-5)


def test_a_sample_of_another_dtype_is_converted() -> None:
    def callback(step: Step) -> None:
        raise Stop(torch.full(SHAPE, 0.5, dtype=torch.float64, requires_grad=True))

    got = DDIM5(Model(), SHAPE, seed=3, callback=callback)
    assert torch.equal(got, torch.full(SHAPE, 0.5)) and got.dtype == torch.float32 and not got.requires_grad


def test_of_interpolate() -> None:
    a, b = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)
    model = Model()
    assert interpolate(model, a, b, 3, sampler=DDIM5, seed=1, callback=after(1, "x0")).shape == (3, 3, 4)
    assert model.calls == 2


@pytest.mark.parametrize("value", [True, 1, "stop"])
def test_what_a_callback_returns_does_not_matter(value: object) -> None:
    model = Model()
    DDIM5(model, SHAPE, callback=lambda step: value)
    assert model.calls == 5


def test_the_progress_bar_counts_the_last_row(capsys: pytest.CaptureFixture[str]) -> None:
    DDIM5(Model(), SHAPE, seed=3, callback=after(2), progress=True)
    assert "3/5" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["model", "decode"])
def test_raised_elsewhere_it_is_an_exception_as_any_other(where: str) -> None:
    def stops(*_: object) -> Any:
        raise Stop

    with pytest.raises(Stop) as caught:
        if where == "model":
            DDIM5(stops, SHAPE, seed=3)
        else:
            DDIM5(Model(), SHAPE, seed=3, decode=stops)
    assert caught.value.sample is not None and caught.value.sample.shape == SHAPE


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        pytest.param(torch.zeros(2, 3), "must have shape", id="shape"),
        pytest.param(torch.zeros(()), "must have shape", id="scalar"),
        pytest.param("converged", "sample must be a floating-point tensor", id="text"),
        pytest.param(np.zeros(SHAPE), "sample must be a floating-point tensor", id="numpy"),
        pytest.param(torch.zeros(SHAPE, dtype=torch.uint8), "sample must be a floating-point tensor", id="bytes"),
    ],
)
def test_refuses_what_is_no_sample(sample: Any, message: str) -> None:
    def callback(step: Step) -> None:
        raise Stop(sample)

    with pytest.raises((TypeError, ValueError), match=message) as caught:
        DDIM5(Model(), SHAPE, seed=3, callback=callback)
    assert torch.equal(caught.value.sample, wanted(DDIM5, 0, "state"))  # type: ignore[attr-defined]


def replaces(step: Step) -> None:
    step.x = step.x * 2


def moves(step: Step) -> None:
    step.x.data = step.x.data * 2


@pytest.mark.parametrize(
    ("change", "gradients"),
    [
        pytest.param(replaces, False, id="replaced"),
        pytest.param(moves, False, id="moved"),
        pytest.param(replaces, True, id="replaced-with-gradients"),
    ],
)
def test_a_replaced_state_is_refused_as_in_a_run_that_goes_on(change: Callable[[Step], None], gradients: bool) -> None:
    """Kernels know its address, and a prepared run would use it again."""

    def callback(step: Step) -> None:
        change(step)
        raise Stop

    with pytest.raises(ValueError, match=r"step\.x was replaced"):
        DDIM5(Model(), torch.ones(SHAPE, requires_grad=gradients), callback=callback)


def test_it_is_copied_and_pickled() -> None:
    assert pickle.loads(pickle.dumps(Stop())).sample is None
    assert torch.equal(pickle.loads(pickle.dumps(Stop(torch.ones(2)))).sample, torch.ones(2))
