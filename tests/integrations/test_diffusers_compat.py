"""Where diffusers is mistaken drop-in schedulers are right, and with compat="diffusers" they are as mistaken."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fastsample
import fastsample.integrations.diffusers as ours

SCALED: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def drawn(channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(2, channels, 4, 5, generator=torch.Generator().manual_seed(seed))


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * torch.tanh(x)


def three(name: str, **options: Any) -> tuple[Any, Any, Any]:
    """diffusers' scheduler, the drop-in that repeats its mistakes, and the drop-in."""
    own = getattr(ours, name)
    return getattr(diffusers, name)(**options), own(**options, compat="diffusers"), own(**options)


def run(scheduler: Any, x: Tensor, **given: Any) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, **given).prev_sample
    return x


def apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(
    ("spacing", "steps"), [("trailing", 7), ("linspace", 10), ("trailing", 600)], ids=["trailing", "linspace", "many"]
)
def test_ddim_steps_lead_to_the_next_timestep(spacing: str, steps: int) -> None:
    theirs, same, right = three("DDIMScheduler", **SCALED, timestep_spacing=spacing, clip_sample=False)
    for scheduler in (theirs, same, right):
        scheduler.set_timesteps(steps)
    want = run(theirs, drawn())
    assert apart(run(same, drawn()), want) < 1e-5
    visited = [int(t) for t in theirs.timesteps]
    sampler = fastsample.DDIM(fastsample.Schedule.scaled_linear(), timesteps=visited)
    truth = sampler(model, drawn())
    assert apart(run(right, drawn()), truth) < 1e-5 and apart(want, truth) > 1e-4


def test_inversion_comes_from_the_timestep_before() -> None:
    theirs, same, right = three("DDIMInverseScheduler", **SCALED, timestep_spacing="trailing", clip_sample=False)
    forward = ours.DDIMScheduler(**SCALED, timestep_spacing="trailing", clip_sample=False)
    for scheduler in (theirs, same, right, forward):
        scheduler.set_timesteps(700)
    want = run(theirs, drawn())
    assert apart(run(same, drawn()), want) < 1e-5
    # There and back: what is left are the errors of 700 steps each way.
    assert apart(run(forward, run(right, drawn())), drawn()) < apart(run(forward, want), drawn())


@pytest.mark.parametrize("steps", [10, 1000])
def test_fixed_large_log_is_fixed_large(steps: int) -> None:
    theirs, same, right = three("DDPMScheduler", **SCALED, variance_type="fixed_large_log")
    (_, _, large) = three("DDPMScheduler", **SCALED, variance_type="fixed_large")
    results = []
    for scheduler in (theirs, same, right, large):
        scheduler.set_timesteps(steps)
        source = torch.Generator().manual_seed(0)
        results.append(scheduler.step(model(drawn(), torch.ones(1)), scheduler.timesteps[1], drawn(), source)[0])
    want, as_mistaken, got, truth = results
    assert torch.equal(got, truth) and got.isfinite().all() and not torch.equal(got, want)
    assert torch.allclose(as_mistaken, want, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_learned_variance_is_a_log_variance() -> None:
    theirs, same, right = three("DDPMScheduler", **SCALED, variance_type="learned", clip_sample=False)
    output = torch.cat([model(drawn(), torch.ones(1)), torch.full((2, 3, 4, 5), -3.0)], 1)
    results = []
    for scheduler in (theirs, same, right):
        scheduler.set_timesteps(10)
        source = torch.Generator().manual_seed(0)
        results.append(scheduler.step(output, scheduler.timesteps[1], drawn(), source).prev_sample)
    want, as_mistaken, got = results
    assert torch.allclose(as_mistaken, want, rtol=1e-5, atol=1e-6, equal_nan=True) and want.isnan().all()
    quiet = ours.DDPMScheduler(**SCALED, variance_type="learned", clip_sample=False)
    quiet.set_timesteps(10)
    output[:, 3:] = -200.0  # whose noise is nothing beside the mean
    mean = quiet.step(output, quiet.timesteps[1], drawn(), torch.Generator().manual_seed(0)).prev_sample
    noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(got - mean, torch.tensor(-1.5).exp() * noise, atol=1e-5)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_timesteps_stay_in_the_schedule(name: str) -> None:
    """steps_offset would take a run of all timesteps one beyond it."""
    theirs, same, right = three(name, **SCALED, steps_offset=1)
    for scheduler in (theirs, same, right):
        scheduler.set_timesteps(1000)
    assert torch.equal(theirs.timesteps, same.timesteps) and theirs.timesteps.max() == 1000
    assert torch.equal(right.timesteps, torch.arange(999, -1, -1))
    with pytest.raises(IndexError):
        theirs.step(drawn(), theirs.timesteps[0], drawn())
    with pytest.raises(IndexError):
        same.step(drawn(), same.timesteps[0], drawn())
    assert right.step(drawn(), right.timesteps[0], drawn()).prev_sample.isfinite().all()


def test_the_last_step_of_lcm_adds_no_noise_where_some_are_left_out() -> None:
    """As in image to image, whose pipeline leaves out the first ones, and says so to the scheduler or not."""
    results = []
    for scheduler in three("LCMScheduler", **SCALED):
        scheduler.set_timesteps(4)
        scheduler.timesteps = scheduler.timesteps[2:]
        x = drawn()
        for t in scheduler.timesteps:
            x, denoised = scheduler.step(model(x, t), t, x, torch.Generator().manual_seed(0), return_dict=False)
        results.append((x, denoised))
    (want, their_denoised), (as_mistaken, _), (got, denoised) = results
    assert apart(as_mistaken, want) < 1e-5 and not torch.equal(want, their_denoised)
    assert torch.equal(got, denoised)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "TCDScheduler", "LCMScheduler"])
def test_epsilon_at_an_alpha_bar_of_0(name: str) -> None:
    theirs, same, right = three(name, **SCALED, rescale_betas_zero_snr=True, **SPACED.get(name, {}))
    results = []
    for scheduler in (theirs, same, right):
        scheduler.set_timesteps(4)
        results.append(run(scheduler, drawn(), generator=torch.Generator().manual_seed(0)))
    want, as_mistaken, got = results
    assert torch.equal(as_mistaken.isfinite(), want.isfinite())
    assert got.isfinite().all()


SPACED: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"timestep_spacing": "trailing", "clip_sample": False},
    "DDPMScheduler": {"timestep_spacing": "trailing", "clip_sample": False},
}


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_eta_of_1_from_an_alpha_bar_of_0(steps: int) -> None:
    """The direction's coefficient is the root of 0, or of what rounding leaves of it, which may be below."""
    options = {**SCALED, "prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}
    results = []
    for scheduler in three("DDIMScheduler", **options, rescale_betas_zero_snr=True):
        scheduler.set_timesteps(steps)
        results.append(run(scheduler, drawn(), eta=1.0, generator=torch.Generator().manual_seed(0)))
    want, as_mistaken, got = results
    assert torch.equal(as_mistaken.isfinite(), want.isfinite()) and got.isfinite().all()


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_first_timestep_that_is_there_twice(name: str) -> None:
    """Their first step is then that of the second, and there are too few for the run."""
    theirs, same, right = three(name, use_beta_sigmas=True, rescale_betas_zero_snr=True)
    for scheduler in (theirs, same, right):
        scheduler.set_timesteps(10)
    assert theirs.timesteps[0] == theirs.timesteps[1]
    with pytest.raises((AssertionError, IndexError)):
        run(theirs, drawn())
    with pytest.raises(ValueError, match="all 10 steps"):
        run(same, drawn())
    theirs.set_timesteps(10)
    theirs.set_begin_index(0)
    assert apart(run(right, drawn()), run(theirs, drawn())) < 1e-4


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler"])
def test_noise_is_added_in_float32(name: str) -> None:
    theirs, same, right = three(name, **SCALED)
    x, noise, t = drawn().to(torch.bfloat16), drawn(seed=1).to(torch.bfloat16), torch.tensor([0, 0])
    exact = theirs.add_noise(x.double(), noise.double(), t)
    assert torch.equal(same.add_noise(x, noise, t), theirs.add_noise(x, noise, t))
    # bfloat16 has no number between 0.9960 and 1, so that an alpha bar of 0.9991 leaves no noise.
    assert torch.equal(theirs.add_noise(x, noise, t), x)
    assert (right.add_noise(x, noise, t) - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert not torch.equal(right.add_noise(x, noise, t), x)


NOISY = ("EulerAncestralDiscreteScheduler", "CMStochasticIterativeScheduler", "TCDScheduler")


@pytest.mark.parametrize(
    "name",
    [
        *("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
        *("FlowMatchEulerDiscreteScheduler", *NOISY),
    ],
)
def test_where_compat_changes_nothing(name: str) -> None:
    results = []
    for scheduler in three(name)[1:]:
        scheduler.set_timesteps(5)
        x, source = drawn(), torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(model(seen, t), t, x, **({"generator": source} if name in NOISY else {})).prev_sample
        results.append(x)
    assert torch.equal(*results)
