"""Configurations of drop-in schedulers: signatures, files, and what diffusers' tests of its schedulers ask of them."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fastsample.integrations.diffusers as ours
from fastsample.integrations.diffusers import same_as

NAMES = [name for name in ours.__all__ if name.endswith("Scheduler")]
OPTIONS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0, "use_dynamic_shifting": False},
    "CMStochasticIterativeScheduler": {"clip_denoised": False},
}


def drawn(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


def options(scheduler: Any) -> dict[str, Any]:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def run(scheduler: Any, steps: int = 3) -> Tensor:
    scheduler.set_timesteps(steps)
    x = drawn()
    given = {"generator": torch.Generator().manual_seed(1)}
    given = given if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(0.5 * torch.tanh(seen), t, x, **given).prev_sample
    return x


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_diffusers_and_a_little_more(name: str) -> None:
    theirs, own = getattr(diffusers, name), getattr(ours, name)
    assert issubclass(own, theirs) and own.__module__ == "fastsample.integrations.diffusers"
    for method in [name for name, value in vars(theirs).items() if inspect.isfunction(value)]:
        mine = inspect.signature(getattr(own, method)).parameters
        for parameter in inspect.signature(getattr(theirs, method)).parameters.values():
            assert mine[parameter.name].default == parameter.default or parameter.default is inspect.Parameter.empty
            assert mine[parameter.name].kind == parameter.kind
        more = {one.name for one in mine.values() if one.kind is one.KEYWORD_ONLY}
        more -= set(inspect.signature(getattr(theirs, method)).parameters)
        assert more <= {"__init__": {"compat"}, "step": {"seed", "index"}}.get(method, set())
    assert own._compatibles == theirs._compatibles and own.order == theirs.order


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compat", [None, "diffusers"])
def test_round_trips(tmp_path: Path, name: str, compat: Any) -> None:
    own = getattr(ours, name)(**OPTIONS.get(name, {}), compat=compat)
    assert own.compat == compat and ("compat" in own.config) == (compat is not None)
    own.save_pretrained(tmp_path)
    want = run(own)
    for again in (
        type(own).from_pretrained(tmp_path),
        type(own).from_config(own.config),
        copy.deepcopy(own),
        pickle.loads(pickle.dumps(own)),
    ):
        assert type(again) is type(own) and again.compat == compat and options(again) == options(own)
        assert torch.equal(run(again), want)
    theirs = getattr(diffusers, name).from_pretrained(tmp_path)
    assert type(theirs) is getattr(diffusers, name)
    back = type(own).from_config(theirs.config, compat=compat)
    assert torch.equal(run(back), want)


@pytest.mark.parametrize("name", NAMES)
def test_the_config_of_another_class(name: str) -> None:
    """One line of a user, whatever the pipeline came with."""
    for other in (diffusers.PNDMScheduler(skip_prk_steps=True), diffusers.EulerDiscreteScheduler()):
        own = getattr(ours, name).from_config(other.config)
        assert type(own) is getattr(ours, name) and run(own).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_same_as_keeps_the_state(name: str) -> None:
    theirs = getattr(diffusers, name)(**OPTIONS.get(name, {}))
    theirs.set_timesteps(4)
    found: Any = same_as(theirs)
    assert type(found) is getattr(ours, name) and found.compat == "diffusers"
    assert torch.equal(found.timesteps, theirs.timesteps) and found.num_inference_steps == 4
    assert (run(found) - run(theirs)).abs().max() < 1e-4


def test_same_as_of_what_has_no_drop_in() -> None:
    class Own(diffusers.DDIMScheduler):  # type: ignore[misc]
        """A user's, whose step may be another one."""

    assert same_as(diffusers.PNDMScheduler()) is None and same_as(Own()) is None and same_as(None) is None


def test_any_attribute_may_be_set_and_others_are_missed_in_diffusers_words() -> None:
    own, theirs = ours.DDIMScheduler(), diffusers.DDIMScheduler()
    for scheduler in (own, theirs):
        scheduler.dummy_attribute = 5
    messages = []
    for scheduler in (own, theirs):
        with pytest.raises(AttributeError) as found:
            scheduler.does_not_exist  # noqa: B018
        messages.append(str(found.value))
    assert messages[0] == messages[1]


def one_step(scheduler: Any, t: Any, steps: int | None = 10) -> Tensor:
    if steps:
        scheduler.set_timesteps(steps)
    found: Tensor = scheduler.step(0.1 * drawn(), t, drawn(), generator=torch.Generator().manual_seed(0)).prev_sample
    return found


ODD: dict[str, tuple[str, dict[str, Any], Any, int | None]] = {
    "another variance_type": ("DDPMScheduler", {"variance_type": "other"}, 500, 10),
    "alpha bars below 0": ("DDIMScheduler", {"beta_end": 2.0}, 0, 10),
    "alpha bars below 0 of DDPM": ("DDPMScheduler", {"beta_end": 2.0}, 0, None),
    "zero SNR": ("DDIMScheduler", {"rescale_betas_zero_snr": True}, 0, 10),
    "two trained betas": ("DDIMScheduler", {"trained_betas": [1e-4, 2e-4]}, 0, 10),
    "two trained betas of DDPM": ("DDPMScheduler", {"trained_betas": [1e-4, 2e-4]}, 1, None),
    "one timestep": ("DDPMScheduler", {"num_train_timesteps": 1}, 0, None),
    "a timestep that is not the scheduler's": ("DDIMScheduler", {}, 523, 10),
    "DDPM without set_timesteps": ("DDPMScheduler", {}, 523, None),
    "a timestep before the first one": ("DDIMScheduler", {}, -1, 10),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_schedules_and_timesteps(case: str) -> None:
    name, options, t, steps = ODD[case]
    own = one_step(getattr(ours, name)(**options, compat="diffusers"), t, steps)
    theirs = one_step(getattr(diffusers, name)(**options), t, steps)
    assert torch.allclose(own, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_sigmas_that_rise() -> None:
    """As the second does in a run of all timesteps with zero SNR, whose first is capped: a root of what is below 0."""
    found = []
    for kind in (diffusers.EulerAncestralDiscreteScheduler, ours.EulerAncestralDiscreteScheduler):
        scheduler = kind(rescale_betas_zero_snr=True)
        scheduler.set_timesteps(1000)
        assert scheduler.sigmas[1] > scheduler.sigmas[0]
        t = scheduler.timesteps[0]
        m = 0.1 * scheduler.scale_model_input(drawn(), t)
        found.append(scheduler.step(m, t, drawn(), generator=torch.Generator().manual_seed(0)))
        assert scheduler.step_index == 1
    assert found[0].prev_sample.isnan().all() and found[1].prev_sample.isnan().all()
    torch.testing.assert_close(found[1].pred_original_sample, found[0].pred_original_sample)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler"])
def test_noise_and_velocity_in_half_precision(name: str) -> None:
    """An alpha bar of 0.9999 is 1 in half precision, which would leave no noise."""
    own = getattr(ours, name)()
    x, noise, t = drawn(), drawn(1), torch.tensor([0, 700])
    for method in ("add_noise", "get_velocity"):
        if not hasattr(getattr(diffusers, name), method):
            continue
        want = getattr(own, method)(x.double(), noise.double(), t)
        for dtype, near in ((torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
            got = getattr(own, method)(x.to(dtype), noise.to(dtype), t)
            assert got.dtype == dtype and (got.double() - want).abs().max() <= near * want.abs().max()
        theirs = getattr(getattr(diffusers, name)(), method)(x, noise, t)
        assert torch.allclose(getattr(own, method)(x, noise, t), theirs, atol=1e-6)
    assert own.alphas_cumprod.dtype == torch.float32


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "compat": (lambda: ours.DDIMScheduler(compat="peers"), ValueError, "compat"),
    "no such option": (lambda: ours.DDIMScheduler(beta_begin=1e-4), TypeError, "beta_begin"),
    "solver_p": (lambda: ours.UniPCMultistepScheduler(solver_p=diffusers.DDIMScheduler()), ValueError, "solver_p"),
    "order 3 of sde-dpmsolver": (
        lambda: ours.DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min"
        ),
        ValueError,
        "solver_order",
    ),
    "a schedule without a name": (
        lambda: ours.DDIMScheduler(beta_schedule="circular"),
        NotImplementedError,
        "circular",
    ),
    "too many steps": (lambda: ours.DDIMScheduler().set_timesteps(1001), ValueError, "1000"),
    "no steps": (lambda: ours.DDIMScheduler().set_timesteps(0), ValueError, "num_inference_steps"),
    "DDIM before set_timesteps": (lambda: one_step(ours.DDIMScheduler(), 0, None), ValueError, "set_timesteps"),
    "LCM before set_timesteps": (lambda: one_step(ours.LCMScheduler(), 0, None), ValueError, "set_timesteps"),
    "UniPC before set_timesteps": (
        lambda: ours.UniPCMultistepScheduler().step(drawn(), 0, drawn()),
        ValueError,
        "set_timesteps",
    ),
    "two sources of noise": (
        lambda: begun("DDIMScheduler").step(
            drawn(), 900, drawn(), eta=1.0, generator=torch.Generator(), variance_noise=drawn()
        ),
        ValueError,
        "generator and variance_noise",
    ),
    "a seed and a generator": (
        lambda: begun("DDPMScheduler").step(drawn(), 900, drawn(), generator=torch.Generator(), seed=1),
        ValueError,
        "seed",
    ),
    "an eta of TCD": (
        lambda: begun("TCDScheduler").step(drawn(), begun("TCDScheduler").timesteps[0], drawn(), eta=1.5),
        AssertionError,
        "eta",
    ),
    "a whole number for Euler": (
        lambda: begun("EulerDiscreteScheduler").step(drawn(), 3, drawn()),
        ValueError,
        "integer indices",
    ),
    "no tensor": (lambda: begun("DDIMScheduler").step([1.0], 900, drawn()), TypeError, "model_output"),
    "whole numbers for a state": (
        lambda: begun("DDIMScheduler").step(drawn(), 900, torch.ones(2, 3, 4, 5, dtype=torch.int64)),
        TypeError,
        "sample",
    ),
    "another shape": (lambda: begun("DDIMScheduler").step(drawn()[:1], 900, drawn()), ValueError, "model_output"),
}


def begun(name: str) -> Any:
    scheduler = getattr(ours, name)()
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    call, error, says = REFUSED[case]
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("name", ["LCMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_step_after_the_last_one(name: str) -> None:
    scheduler = getattr(ours, name)()
    run(scheduler)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(drawn(), torch.tensor(scheduler.timesteps[-1].item() + 1), drawn())
