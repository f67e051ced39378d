"""What goes wrong in the hands of users: silent misuse is refused or warned of, natural arguments are taken."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastsample
from fastsample import DDIM, DPMSolver, Euler, Heun, Sampler, Schedule, Table, ddim, ddpm, ops

SHAPE = (2, 3, 6, 5)
COND, UNCOND = {"c": torch.ones(2, 1, 1, 1)}, {"c": torch.zeros(2, 1, 1, 1)}
GUIDED: dict[str, Any] = dict(cond=COND, uncond=UNCOND, steps=4)


def model(x: Tensor, t: Tensor, c: Tensor | float = 0.0) -> Tensor:
    return 0.1 * x + 0.2 * c


@pytest.mark.parametrize("message", ["__array__ implementation doesn't accept a copy keyword", "another one"])
def test_what_is_deprecated_here_is_an_error_in_these_tests(message: str) -> None:
    with pytest.raises(DeprecationWarning, match=message):
        warnings.warn_explicit(message, DeprecationWarning, "schedule.py", 1, module="fastsample.schedule")


def test_warnings_that_are_left_out_name_whose_they_are(pytestconfig: pytest.Config) -> None:
    left_out = [line.split(":") for line in pytestconfig.getini("filterwarnings") if line.startswith("ignore")]
    assert left_out and all(len(parts) > 3 and not parts[3].startswith("fast") for parts in left_out)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        pytest.param(lambda: DPMSolver(Schedule.cosine(), timesteps="linspace"), "give clip=", id="dpm_solver"),
        pytest.param(lambda: Euler(Schedule.cosine(), timesteps="linspace"), "give clip=", id="euler"),
        pytest.param(
            lambda: Heun(Schedule.cosine(), clip=1.0, timesteps="linspace"), "timesteps='karras'", id="heun-clip"
        ),
    ],
)
def test_rows_that_make_something_huge_of_small_errors_are_warned_of_at_the_callers_line(
    make: Any, remedy: str
) -> None:
    with pytest.warns(UserWarning, match=remedy) as caught:
        make()
    assert [warning.filename for warning in caught] == [__file__]


def test_a_function_warns_at_the_callers_line_too() -> None:
    with pytest.warns(UserWarning, match="give clip=") as caught:
        fastsample.dpm_solver(model, SHAPE, schedule=Schedule.cosine(), timesteps="linspace")
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: DDIM(Schedule.cosine(), timesteps="leading"), id="ddim-leading"),
        *(
            pytest.param(lambda make=make, n=n: make(Schedule.cosine(), steps=n), id=f"{make.__name__}-{n}")
            for make in (DDIM, DPMSolver, Euler)
            for n in (1, 2, 4, 50, 500)
        ),
        pytest.param(lambda: DPMSolver(Schedule.cosine(), clip=1.0), id="dpm_solver-clip"),
        pytest.param(lambda: Heun(Schedule.cosine(), clip=1.0, timesteps="karras"), id="heun-karras-clip"),
        pytest.param(lambda: Heun(Schedule.linear()), id="heun-linear"),
        pytest.param(lambda: fastsample.LCM(Schedule.scaled_linear()), id="lcm"),
        pytest.param(lambda: fastsample.DDIMInverse(Schedule.cosine(), convention="improved"), id="inverse"),
        pytest.param(lambda: fastsample.Consistency(), id="consistency"),
    ],
)
def test_sound_tables_do_not_warn(make: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()


def test_a_module_without_a_schedule_is_warned_of() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.1 * x

    with pytest.warns(UserWarning, match=r"Bare has no \.schedule"):
        ddim(Bare(), SHAPE, steps=2)


def test_guidance_is_read_once(backend: str) -> None:
    want = ddim(model, SHAPE, seed=0, guidance=[2.0, 3.0], backend=backend, **GUIDED)
    weights = torch.tensor([2.0, 3.0])
    got = ddim(
        model, SHAPE, seed=0, guidance=weights, callback=lambda step: weights.fill_(50), backend=backend, **GUIDED
    )
    assert torch.equal(got, want)
    negated = torch.tensor([-2.0, -3.0])._neg_view()
    assert torch.equal(ddim(model, SHAPE, seed=0, guidance=negated, backend=backend, **GUIDED), want)


@pytest.mark.parametrize("useless", ["uncond", "guidance_interval", "guidance_rescale"])
def test_what_means_nothing_without_guidance_is_refused(useless: str) -> None:
    value = {"uncond": UNCOND, "guidance_interval": (0, 999), "guidance_rescale": 0.5}[useless]
    with pytest.raises(ValueError, match=f"{useless} without guidance="):
        ddim(model, SHAPE, steps=2, **{useless: value})


@pytest.mark.parametrize("interval", [500, (0,), (0, 1, 2), ("a", "b")], ids=str)
def test_an_interval_that_is_none(interval: Any) -> None:
    with pytest.raises(TypeError, match="guidance_interval must be"):
        ddim(model, SHAPE, guidance=2.0, guidance_interval=interval, **GUIDED)


def test_intervals_of_numpy_numbers_and_such_without_a_row() -> None:
    given = dict(seed=0, guidance=2.0, timesteps="leading", **GUIDED)
    want = ddim(model, SHAPE, guidance_interval=(0, 500), **given)
    got = ddim(model, SHAPE, guidance_interval=(np.float64(0), np.float64(500)), **given)
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"holds none of the times 750 \.\. 0"):
        ddim(model, SHAPE, guidance_interval=(0.2, 0.8), **given)


def test_keywords_in_tuples_are_doubled_too(backend: str) -> None:
    def residual(x: Tensor, t: Tensor, extra: tuple[Tensor, Tensor]) -> Tensor:
        return extra[0] * extra[1]

    extra = (torch.ones(SHAPE), torch.full(SHAPE, 0.5))
    cond, uncond = {"extra": extra}, {"extra": (0 * extra[0], extra[1])}
    got = ddim(residual, SHAPE, guidance=2.0, cond=cond, uncond=uncond, seed=0, steps=3, backend=backend)
    # 0 + 2 (1/2 - 0), exactly.
    assert torch.equal(got, ddim(lambda x, t: torch.ones_like(x), SHAPE, seed=0, steps=3, backend=backend))


def test_generators_do_not_break_gradients_of_a_learned_variance() -> None:
    def learned(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([0.1 * x, 0.1 * x], dim=1)

    x = torch.randn(SHAPE, requires_grad=True)
    ddpm(learned, x, steps=4, variance="learned_range", noise=torch.Generator().manual_seed(0)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("requires_grad", [False, True], ids=["in-place", "differentiable"])
def test_a_replaced_state_is_not_ignored(requires_grad: bool) -> None:
    def replace(step: fastsample.Step) -> None:
        step.x = torch.zeros_like(step.x)

    with pytest.raises(ValueError, match="may only be changed in place"):
        ddim(model, torch.zeros(SHAPE, requires_grad=requires_grad), steps=3, callback=replace)


def test_autograd_objects_where_a_step_has_been_overwritten() -> None:
    weight = torch.ones(SHAPE, requires_grad=True)
    total = torch.zeros(())
    for step in DDIM(Schedule.linear(), steps=3).iterate(model, SHAPE):
        total = total + (step.x * weight).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_expanded_outputs_are_refused_before_anything_is_written(backend: str) -> None:
    x, x0 = torch.ones(2, 3), torch.full((2, 3), float("nan"))
    with pytest.raises(ValueError, match="out is expanded"):
        ops.step(x, x, Table([0], a=1.0, p=5.0), 0, out=torch.zeros(1, 3).expand(2, 3), x0_out=x0, backend=backend)
    assert x0.isnan().all()


def test_sampler_of_a_table_of_ones_own(backend: str) -> None:
    sampler = DDIM(Schedule.linear(), steps=5)
    got, want = (one(model, SHAPE, seed=0, backend=backend) for one in (Sampler(sampler.table), sampler))
    assert torch.equal(got, want)
    with pytest.raises(TypeError, match=r"fastsample\.Table"):
        Sampler("table")  # type: ignore[arg-type]


def test_natural_arguments_are_taken() -> None:
    final = Schedule.linear().alphas_cumprod[0]
    want = ddim(model, SHAPE, seed=0, steps=4, final_alpha_cumprod=float(final))
    for given in (final, torch.tensor(final)):
        assert torch.equal(ddim(model, SHAPE, seed=0, steps=4, final_alpha_cumprod=given), want)
    decoded = ddim(model, SHAPE, seed=0, steps=4, decode=lambda x: SimpleNamespace(sample=2 * x))
    assert torch.equal(decoded, 2 * ddim(model, SHAPE, seed=0, steps=4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: ddim(model, np.zeros(SHAPE, np.float32)), "a shape or a tensor, got ndarray", id="numpy"),
        pytest.param(lambda: ddim(model, SHAPE, clip=False), "None for no clipping", id="clip"),
        pytest.param(lambda: ddim(model, SHAPE, guidance="7"), "guidance must be a number", id="guidance"),
        pytest.param(
            lambda: DDIM(Schedule.linear()).iterate(model, SHAPE, out=0), "iterate takes no out", id="iterate"
        ),
    ],
)
def test_type_errors_name_the_argument(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_values_of_another_convention_are_refused() -> None:
    with pytest.raises(ValueError, match="times of a flow are 1000 sigma"):
        fastsample.euler(model, SHAPE, prediction="flow", timesteps=np.linspace(1, 0.04, 25))
    with pytest.raises(ValueError, match="belong to sampling"):
        fastsample.ddim_invert(model, torch.zeros(SHAPE), steps=3, mask=torch.ones(1), known=torch.ones(1))
