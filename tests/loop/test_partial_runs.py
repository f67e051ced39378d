"""Runs that start part-way (strength= from a clean sample, start_step= from a state), decode= and a Step's levels."""

from __future__ import annotations

import functools
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import (
    DDIM,
    DEIS,
    IPNDM,
    DPMSolver,
    DynamicThreshold,
    Heun,
    Sampler,
    Schedule,
    Step,
    Stop,
    Table,
    UniPC,
    ddim,
    ops,
)
from support.guided import COND, UNCOND
from support.whole_runs import never

SHAPE = (3, 2, 6, 5)
CLEAN = 0.5 * ops.randn(SHAPE, seed=77)
SCHEDULE = Schedule.linear()


def model(x: Tensor, t: Tensor, c: Tensor | float = 0.0) -> Tensor:
    c = c.to(x.dtype) if isinstance(c, Tensor) else c
    return 0.5 * torch.tanh(x) + c * torch.cos(x)


def times_of(run: Any, *arguments: Any, **options: Any) -> list[int]:
    times: list[int] = []
    run(*arguments, callback=lambda step: times.append(step.t), **options)
    return times


# start_step

OPTIONS = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"eta": 1.0, "clip": 1.0}, {}, id="noise-clip"),
    pytest.param({"eta": 1.0}, {"model_dtype": torch.float16}, id="half-precision"),
    pytest.param({"clip": DynamicThreshold(0.9)}, {}, id="threshold"),
    pytest.param(
        {"eta": 0.5},
        {"guidance": 3.0, "cond": COND, "uncond": UNCOND, "guidance_interval": (300, 700), "guidance_rescale": 0.5},
        id="guided",
    ),
    pytest.param({"eta": 1.0, "correct_x0": lambda x0, t: 0.9 * x0}, {}, id="correct-x0"),
    pytest.param({"eta": 1.0}, {"mask": torch.tensor([1.0, 0.5, 0.0, 1.0, 0.0]), "known": CLEAN}, id="inpainting"),
]


@pytest.mark.parametrize(("arguments", "options"), OPTIONS)
def test_the_tail_of_a_run_has_the_bits_of_the_whole(
    backend: str, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    """Noise is counted by rows, so a run that is taken up again draws what it would have drawn."""
    sampler = DDIM(SCHEDULE, steps=5, **arguments)
    options = {"seed": 3, "backend": backend, **options}
    states = [step.x.clone() for step in sampler.iterate(model, SHAPE, **options)]
    want = sampler(model, SHAPE, **options)
    assert torch.equal(states[-1], want)
    for start in range(1, 5):
        before = states[start - 1].clone()
        assert torch.equal(sampler(model, before, start_step=start, **options), want), start
        assert torch.equal(before, states[start - 1]), "x is only read"
        rest = [(step.index, step.x.clone()) for step in sampler.iterate(model, before, start_step=start, **options)]
        assert [index for index, _ in rest] == list(range(start, 5))
        assert all(torch.equal(x, states[index]) for index, x in rest)
    assert torch.equal(sampler(model, ops.randn(SHAPE, seed=3), start_step=0, **options), want)


def test_only_the_rows_from_there_on_run() -> None:
    assert times_of(ddim, model, CLEAN, steps=5, timesteps="leading", start_step=3) == [200, 0]
    asked: list[int] = []

    def noise(k: int) -> Tensor:
        asked.append(k)
        return torch.zeros(SHAPE)

    ddim(model, CLEAN, steps=5, eta=1.0, start_step=2, noise=noise)
    assert asked == [2, 3], "rows keep their number"


WITH_MEMORY: dict[str, Sampler] = {
    "dpm-solver-3": DPMSolver(SCHEDULE, steps=9, order=3),
    "dpm-solver-sde": DPMSolver(SCHEDULE, steps=9, sde=True),
    "dpm-solver-flow": DPMSolver(prediction="flow", steps=9),
    "unipc-3": UniPC(SCHEDULE, steps=9, order=3),
    "deis": DEIS(SCHEDULE, steps=9),
    "ipndm-4": IPNDM(SCHEDULE, steps=9),
}


def stopped(sampler: Sampler, last: int, **options: Any) -> torch.Tensor:
    """The state of a run that a callback ends after this row."""

    def stop(step: Step) -> None:
        if step.index == last:
            raise Stop

    return sampler(model, SHAPE, callback=stop, **options)


@pytest.mark.parametrize("name", WITH_MEMORY)
@pytest.mark.parametrize("start", [1, 4, 8])
def test_a_stopped_run_goes_on_with_order_1(name: str, start: int) -> None:
    """No row reads what is not there, and the end is near that of the whole: 1 % off, an SDE's of order 1 20 %."""
    sampler = WITH_MEMORY[name]
    reads = sampler.table_from(start).reads[start:]
    assert reads[0] == 0 and all(earlier <= k for k, earlier in enumerate(reads))
    x = stopped(sampler, start - 1, seed=3)
    got, whole = sampler(model, x, start_step=start, seed=3), sampler(model, SHAPE, seed=3)
    assert (got - whole).abs().max() < (0.2 if name.endswith("sde") else 0.01) * whole.abs().max()
    rest = [step.index for step in sampler.iterate(model, x, start_step=start, seed=3)]
    assert rest == list(range(start, 9))


@pytest.mark.parametrize("sampler", [DDIM(SCHEDULE, steps=6, eta=1.0), Heun(SCHEDULE, steps=7)], ids=["ddim", "heun"])
def test_a_stopped_run_of_others_goes_on_as_if_it_had_not_been(sampler: Sampler) -> None:
    x = stopped(sampler, 3, seed=3)
    assert torch.equal(sampler(model, x, start_step=4, seed=3), sampler(model, SHAPE, seed=3))


def test_gradients_from_a_start_step() -> None:
    x = CLEAN.clone().requires_grad_()
    got = ddim(model, x, steps=5, start_step=2, eta=0.5, seed=0)
    assert got.requires_grad
    assert (got - ddim(model, CLEAN, steps=5, start_step=2, eta=0.5, seed=0)).abs().max() < 1e-5


# strength


@pytest.mark.parametrize("steps", [1, 4, 7, 10, 50])
@pytest.mark.parametrize("strength", [0.01, 0.1, 0.25, 0.28, 0.29, 0.3, 0.5, 0.58, 0.75, 0.999, 1.0])
def test_strength_starts_where_diffusers_does(steps: int, strength: float) -> None:
    # get_timesteps of the image-to-image pipelines.
    kept = min(int(steps * strength), steps)
    sampler = DDIM(SCHEDULE, steps=steps)
    if kept == 0:
        with pytest.raises(ValueError, match=f"leave at least one of {steps} rows"):
            sampler(model, CLEAN, strength=strength)
    else:
        assert times_of(sampler, model, CLEAN, strength=strength) == sampler.table.t[max(steps - kept, 0) :].tolist()


@pytest.mark.parametrize(("arguments", "options"), OPTIONS)
@pytest.mark.parametrize(("strength", "start"), [(1.0, 0), (0.6, 2), (0.2, 4)])
def test_strength_noises_the_clean_sample_to_the_level_of_its_first_row(
    backend: str, arguments: dict[str, Any], options: dict[str, Any], strength: float, start: int
) -> None:
    sampler = DDIM(SCHEDULE, steps=5, **arguments)
    options = {"seed": 3, "backend": backend, **options}
    assert sampler.table.alpha is not None and sampler.table.sigma is not None
    alpha_bar = SCHEDULE.alphas_cumprod[sampler.table.t[start]]
    alpha, sigma = float(sampler.table.alpha[start]), float(sampler.table.sigma[start])
    assert (alpha, sigma) == (pytest.approx(math.sqrt(alpha_bar)), pytest.approx(math.sqrt(1 - alpha_bar)))
    noised = CLEAN * alpha + ops.randn(SHAPE, seed=3, backend=backend) * sigma
    got = sampler(model, CLEAN, strength=strength, **options)
    assert torch.equal(got, sampler(model, noised, start_step=start, **options))
    assert not torch.equal(got, sampler(model, SHAPE, **options))


def test_samples_do_not_depend_on_their_batch(backend: str) -> None:
    got = ddim(model, CLEAN, steps=5, eta=1.0, strength=0.6, seed=20, backend=backend)
    for i in range(3):
        alone = ddim(model, CLEAN[i : i + 1], steps=5, eta=1.0, strength=0.6, seed=20, index=i, backend=backend)
        assert torch.equal(got[i : i + 1], alone)


def test_gradients_and_float64_with_strength() -> None:
    common: dict[str, Any] = dict(steps=5, strength=0.6, seed=3)
    x = CLEAN.clone().requires_grad_()
    got = ddim(model, x, **common)
    assert got.requires_grad and (got - ddim(model, CLEAN, **common)).abs().max() < 1e-5
    double = ddim(model, CLEAN.double(), model_dtype=torch.float64, **common)
    assert double.dtype == torch.float64 and (double - got).abs().max() < 1e-5


ONE_LEVEL = Table([2, 1, 0], a=0.5, alpha=[0.1, 0.4, 0.7, 1.0], sigma=[1.0, 0.9, 0.5, 0.0])
RECALLS = ONE_LEVEL.replace(c1=[0.0, 0.0, 0.5])


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        *[
            pytest.param(CLEAN, {"strength": bad}, ValueError, r"strength must lie in \(0, 1\]", id=f"strength-{bad}")
            for bad in (0.0, -0.1, 1.01, math.nan, math.inf)
        ],
        pytest.param(CLEAN, {"strength": 0.1}, ValueError, "at least one of 3 rows, got 0.1", id="strength-too-small"),
        pytest.param(SHAPE, {"strength": 0.5}, ValueError, "strength needs a clean sample as x", id="strength-shape"),
        pytest.param(CLEAN, {"strength": 0.5, "start_step": 1}, ValueError, "not both", id="both"),
        pytest.param(
            CLEAN, {"start_step": 3}, ValueError, r"start_step must lie in \[0, 3\), got 3", id="past-the-end"
        ),
        pytest.param(CLEAN, {"start_step": -1}, ValueError, r"start_step must lie in \[0, 3\), got -1", id="negative"),
        pytest.param(CLEAN, {"start_step": 1.5}, TypeError, "start_step must be an int", id="start-float"),
        pytest.param(
            SHAPE, {"start_step": 1}, ValueError, "start_step needs the state before that row", id="start-shape"
        ),
        pytest.param(CLEAN.long(), {"start_step": 1}, TypeError, "floating-point", id="start-integers"),
    ],
)
def test_refused_before_the_model_is_called(
    x: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ddim(never, x, steps=3, **options)
    with pytest.raises(error, match=message):
        Sampler(ONE_LEVEL).iterate(never, x, **options)


def test_rows_that_need_an_earlier_x0_cannot_start() -> None:
    for start, fits in ((0, True), (1, True), (2, False)):
        if fits:
            assert Sampler(RECALLS)(model, CLEAN, start_step=start).shape == SHAPE
        else:
            with pytest.raises(ValueError, match="Sampler cannot start at row 2, which needs entries of earlier rows"):
                Sampler(RECALLS)(model, CLEAN, start_step=start)
    second = ONE_LEVEL.replace(c2=[0.0, 0.0, 0.5])
    with pytest.raises(ValueError, match="cannot start at row 1"):
        Sampler(second)(model, CLEAN, start_step=1)


def test_strength_goes_back_by_one_row_where_that_can_start() -> None:
    assert times_of(Sampler(ONE_LEVEL), model, CLEAN, strength=0.4) == [0]
    assert times_of(Sampler(RECALLS), model, CLEAN, strength=0.4) == [1, 0], "row 2 needs row 1"
    everywhere = Sampler(ONE_LEVEL.replace(c1=[0.0, 0.5, 0.5]))
    with pytest.raises(ValueError, match="cannot start at row 1"):
        everywhere(model, CLEAN, strength=0.4)  # at row 0 it would be all noise


def test_strength_needs_levels() -> None:
    with pytest.raises(ValueError, match=r"strength needs a table with noise levels: Table\(\.\.\., alpha=, sigma=\)"):
        Sampler(Table([1, 0], a=1.0))(model, CLEAN, strength=0.5)


# The levels that a step tells, decode and progress


def test_steps_tell_the_level_that_they_lead_to(backend: str) -> None:
    sampler = DDIM(SCHEDULE, timesteps=[900, 500, 20], eta=1.0)
    seen: list[Step] = list(sampler.iterate(model, SHAPE, backend=backend))
    alpha_bar = [*SCHEDULE.alphas_cumprod[[500, 20]], 1.0]
    assert [step.alpha for step in seen] == pytest.approx(np.sqrt(alpha_bar).tolist(), rel=1e-15)
    assert [step.sigma for step in seen] == pytest.approx(np.sqrt(1 - np.array(alpha_bar)).tolist(), rel=1e-15)
    assert {type(value) for step in seen for value in (step.alpha, step.sigma)} == {float}
    *_, last = Sampler(Table([1, 0], a=1.0)).iterate(model, SHAPE, backend=backend)
    assert math.isnan(last.alpha) and math.isnan(last.sigma)
    tail = [(step.index, step.alpha) for step in sampler.iterate(model, CLEAN, start_step=1, backend=backend)]
    assert tail == [(step.index, step.alpha) for step in seen[1:]]


def test_decode_is_given_the_result(backend: str) -> None:
    want = ddim(model, SHAPE, seed=0, steps=4, backend=backend)
    given: list[Tensor] = []

    def decode(x: Tensor) -> str:
        given.append(x)
        assert not torch.is_grad_enabled()
        return "decoded"

    assert ddim(model, SHAPE, seed=0, steps=4, decode=decode, backend=backend) == "decoded"
    assert len(given) == 1 and torch.equal(given[0], want)
    assert ddim(model, SHAPE, seed=0, steps=4, decode=lambda x: None, backend=backend) is None
    wrapped = ddim(model, SHAPE, seed=0, steps=4, decode=lambda x: SimpleNamespace(sample=2 * x), backend=backend)
    assert torch.equal(wrapped, 2 * want), "as decoders of diffusers return it"
    out = torch.full(SHAPE, math.nan)
    assert ddim(model, SHAPE, seed=0, steps=4, decode=decode, out=out, backend=backend) == "decoded"
    assert given[-1] is out and torch.equal(out, want), "out receives what decode is given"
    with pytest.raises(TypeError, match="decode must be callable"):
        ddim(model, SHAPE, seed=0, steps=4, decode="vae")  # type: ignore[arg-type]


def test_decode_of_a_differentiable_run_is_differentiable() -> None:
    x = CLEAN.clone().requires_grad_()
    assert ddim(model, x, steps=3, decode=lambda x: x / 0.18215).requires_grad


def test_the_progress_bar_counts_the_rows_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    ddim(model, CLEAN, steps=5, start_step=2, progress=True)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gidance", "did you mean guidance="),
        ("generator", "did you mean seed= or noise="),
        ("num_inference_steps", "did you mean steps="),
        ("encoder_hidden_states", "model_kwargs={'encoder_hidden_states': ...}"),
        ("frame_of_reference", "the model's own keywords go into model_kwargs="),
    ],
)
def test_unknown_options_are_refused_with_a_hint(name: str, hint: str) -> None:
    for run in (functools.partial(ddim, steps=2), DDIM(SCHEDULE, steps=2).iterate):
        with pytest.raises(TypeError, match=f"DDIM has no argument {name}.*{re.escape(hint)}"):
            run(model, SHAPE, **{name: 1})


def test_what_belongs_to_the_sampler_is_said_to() -> None:
    with pytest.raises(TypeError, match=r"eta belongs to ddim\(\.\.\.\) or DDIM\(\.\.\.\), not here"):
        DDIM(SCHEDULE, steps=2)(model, SHAPE, eta=1.0)


@pytest.mark.parametrize("name", ["callback", "progress", "decode", "out"])
def test_iterate_takes_no_option_of_the_call(name: str) -> None:
    with pytest.raises(TypeError, match=f"iterate takes no {name}: "):
        DDIM(SCHEDULE, steps=2).iterate(model, SHAPE, **{name: None})
