"""fastsample.from_diffusers: configurations against their live schedulers, what is refused, and what is left alone."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample
from benchmarks import from_diffusers as grid
from benchmarks.cases.schedulers import CASES, Case
from benchmarks.models.of_scheduler import OfScheduler
from fastsample import ops
from fastsample.samplers.diffusers.door import KINDS
from support import diffusers_runs
from support.chains import toy_model
from support.paths import ROOT

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore:the row at"),
    pytest.mark.filterwarnings("ignore:x_T is drawn"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

SHAPE = (2, 3, 8, 8)
# Of each class the first, and every third; all are compared by python -m benchmarks.from_diffusers.
FIRST = {case.scheduler: case for case in reversed(CASES)}
SAMPLE = [case for k, case in enumerate(CASES) if k % 3 == 0 or case is FIRST[case.scheduler]]


# What is computed


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_sampler_is_the_scheduler(case: Case) -> None:
    found = grid.difference(case)
    assert found.sample <= grid.MOST_OF_SAMPLES
    assert found.rows <= grid.MOST_OF_ROWS


def test_every_class_is_compared() -> None:
    assert {f"{case.scheduler}Scheduler" for case in SAMPLE} == KINDS.keys()
    assert len(set(map(repr, CASES))) == len(CASES) >= 80
    assert f"compares {len(CASES)} configurations" in (ROOT / "docs" / "from-diffusers.md").read_text()


def test_the_command_prints_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert grid.main(["--only", "FlowMatchHeun"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[-1].startswith("2 configurations, 0 beyond")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("HeunDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("DDIMScheduler", {"timestep_spacing": "linspace"}),
        ("UniPCMultistepScheduler", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_states_and_inputs_are_the_schedulers_in_every_step(name: str, options: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(prediction_type="v_prediction", **options)
    sampler = fastsample.from_diffusers(scheduler, steps=5)
    given: list[tuple[Tensor, Tensor]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        given.append((x.clone(), t.clone()))
        return toy_model(x, t)

    states = [step.x.clone() for step in sampler.iterate(model, SHAPE, seed=5)]
    scheduler.set_timesteps(5)
    x = ops.randn(SHAPE, seed=5) * scheduler.init_noise_sigma
    assert len(states) == len(scheduler.timesteps)
    for t, state, (x_given, t_given) in zip(scheduler.timesteps, states, given, strict=True):
        scaled = scheduler.scale_model_input(x, t)
        close(x_given, scaled)
        assert t_given.dtype == t.dtype and torch.equal(t_given, t.expand(2))
        x = scheduler.step(toy_model(scaled, t.expand(2)), t, x).prev_sample
        close(state, x)


@pytest.mark.parametrize(
    ("name", "options", "left"),
    [
        ("DDIMScheduler", {"clip_sample": False}, 6),
        ("EulerDiscreteScheduler", {}, 6),
        ("HeunDiscreteScheduler", {}, 11),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, 6),
        ("UniPCMultistepScheduler", {"solver_order": 3}, 6),
        ("DEISMultistepScheduler", {"solver_order": 3}, 6),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, 6),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_strength_starts_where_pipelines_do(name: str, options: dict[str, Any], left: int) -> None:
    scheduler = getattr(diffusers, name)(**options)
    model, clean = OfScheduler(scheduler), 0.5 * torch.tanh(ops.randn(SHAPE, seed=9))
    got = fastsample.from_diffusers(scheduler, steps=10)(model, clean, strength=0.6, seed=5)
    scheduler.set_timesteps(10)
    first = len(scheduler.timesteps) - left
    scheduler.set_begin_index(first) if hasattr(scheduler, "set_begin_index") else None
    t = scheduler.timesteps[first : first + 1]
    noised = getattr(scheduler, "add_noise", None) or (lambda x, z, t: scheduler.scale_noise(x, t, z))
    x = noised(clean, ops.randn(SHAPE, seed=5), t)
    scheduler.timesteps = scheduler.timesteps[first:] if name == "DDIMScheduler" else scheduler.timesteps
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps[-left:]:
        x = scheduler.step(model(scaled(x, t), t.expand(2)), t, x).prev_sample
    close(got, x)


def test_the_timesteps_that_a_scheduler_has_are_taken_without_steps() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(timesteps=[999, 700, 300, 50])
    assert fastsample.from_diffusers(scheduler).table.t.tolist() == [999, 700, 300, 50]
    scheduler = diffusers.CMStochasticIterativeScheduler()
    scheduler.set_timesteps(timesteps=[22, 0])
    assert len(fastsample.from_diffusers(scheduler).table) == 2


def test_options_of_other_classes_in_a_config_are_not_looked_at() -> None:
    """Such as from_config leaves there: the scheduler itself does not know them."""
    given = diffusers.DDIMScheduler(clip_sample=True, thresholding=True)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(given.config)
    assert scheduler.config["clip_sample"] and scheduler.config["thresholding"]
    assert np.isinf(fastsample.from_diffusers(scheduler, steps=4).table.limit).all()


def test_options_that_are_changed_later_count() -> None:
    """As the pipelines of Stable Diffusion change theirs."""
    scheduler = diffusers.DDIMScheduler()
    scheduler._internal_dict = type(scheduler.config)({**scheduler.config, "steps_offset": 1, "clip_sample": False})
    table = fastsample.from_diffusers(scheduler, steps=4).table
    assert table.t.tolist() == [751, 501, 251, 1] and np.isinf(table.limit).all()


def test_lcm_takes_a_guidance_embedding() -> None:
    sampler = fastsample.from_diffusers(diffusers.LCMScheduler(), steps=4)
    assert isinstance(sampler, fastsample.LCM)


@pytest.mark.parametrize("kept", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_a_sampler_can_be_copied_and_compared(kept: Callable[[Any], Any]) -> None:
    sampler = fastsample.from_diffusers(diffusers.EulerDiscreteScheduler(), steps=4)
    assert kept(sampler) == sampler and kept(sampler).table == sampler.table and hash(sampler) == hash(kept(sampler))


def test_a_batcher_runs_it() -> None:
    sampler = fastsample.from_diffusers(diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"), steps=4)
    batcher = fastsample.Batcher(toy_model, sampler, batch=2)
    got = batcher.submit(SHAPE[1:], seed=5, index=1).result()
    close(got, sampler(toy_model, SHAPE, seed=5)[1])


# What is left alone


@pytest.mark.parametrize(
    ("name", "options", "arguments"),
    [
        ("DDIMScheduler", {}, {}),
        ("HeunDiscreteScheduler", {}, {}),
        ("LCMScheduler", {}, {"strength": 0.5}),
        (
            "DPMSolverMultistepScheduler",
            {"use_dynamic_shifting": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
            {"mu": 1.0},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_scheduler_is_not_changed(name: str, options: dict[str, Any], arguments: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(7)
    before = copy.deepcopy(vars(scheduler))
    attributes = dict(vars(scheduler.config))
    fastsample.from_diffusers(scheduler, steps=4, **arguments)
    assert vars(scheduler).keys() == before.keys() and vars(scheduler.config) == attributes
    for key, value in before.items():
        assert torch.equal(vars(scheduler)[key], value) if isinstance(value, Tensor) else vars(scheduler)[key] == value


def test_what_a_scheduler_keeps_of_a_run_with_gradients_is_no_matter() -> None:
    scheduler = diffusers.UniPCMultistepScheduler()
    scheduler.set_timesteps(5)
    x = torch.ones(SHAPE, requires_grad=True)
    diffusers_runs.chain(scheduler, toy_model, 2 * x)
    assert scheduler.model_outputs[-1].grad_fn is not None
    assert len(fastsample.from_diffusers(scheduler, steps=4).table) == 4


# Classes


class OwnTimes(diffusers.DDIMScheduler):  # type: ignore[misc, name-defined]
    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = self.timesteps + 3


class OwnStep(diffusers.EulerDiscreteScheduler):  # type: ignore[misc, name-defined]
    def step(self, *arguments: Any, **keywords: Any) -> Any:
        return super().step(*arguments, **keywords)


class DDPMScheduler:
    """Of diffusers by its name alone."""

    config: dict[str, Any] = {}  # noqa: RUF012

    def set_timesteps(self, steps: int) -> None:
        raise AssertionError


def test_a_class_with_times_of_its_own_is_its_base() -> None:
    assert fastsample.from_diffusers(OwnTimes(), steps=4).table.t.tolist() == [753, 503, 253, 3]


def patched() -> Any:
    scheduler = diffusers.DDIMScheduler()
    scheduler.step = lambda *arguments, **keywords: None
    return scheduler


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (OwnStep, "of OwnStep, which has step of its own: only what EulerDiscreteScheduler itself"),
        (patched, "of DDIMScheduler, which has step of its own"),
        (DDPMScheduler, "must be a scheduler of diffusers, got DDPMScheduler"),
        (lambda: diffusers.DDIMScheduler, "got type: give an instance"),
        (lambda: "DDIMScheduler", "got str"),
        (diffusers.PNDMScheduler, "PNDMScheduler has no equivalent.*fastsample.ipndm"),
        (diffusers.DDIMInverseScheduler, "DDIMInverseScheduler has no equivalent.*ddim_invert"),
        (diffusers.KDPM2DiscreteScheduler, "KDPM2DiscreteScheduler has no equivalent.*DPMSolverMultistepScheduler"),
        (diffusers.DPMSolverSinglestepScheduler, "DPMSolverSinglestepScheduler has no equivalent"),
    ],
    ids=lambda value: "" if callable(value) else value[:40],
)
def test_other_classes_are_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fastsample.from_diffusers(make(), steps=4)


# Options and arguments

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
REFUSED = [
    ("DDPM", {"variance_type": "learned"}, "variance_type='learned'"),
    ("DDPM", {"variance_type": "fixed_large_log"}, "variance_type='fixed_large_log'.*'fixed_large'"),
    ("DDIM", {"sample_max_value": 0.5, "thresholding": True}, "sample_max_value=0.5"),
    ("DDIM", {"clip_sample_range": -1.0}, "clip_sample_range=-1.0"),
    ("DDIM", {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
    ("DDIM", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "alpha bar is 0"),
    ("DDIM", {"steps_offset": 300}, "timestep 1050.*steps_offset"),
    ("EulerAncestralDiscrete", {"prediction_type": "sample"}, "prediction_type='sample'"),
    ("DPMSolverMultistep", {"prediction_type": "flow_prediction"}, "use_flow_sigmas=True"),
    ("DPMSolverMultistep", {"use_flow_sigmas": True, "prediction_type": "v_prediction"}, "use_flow_sigmas=True"),
    ("DPMSolverMultistep", {**FLOW, "use_karras_sigmas": True}, "use_flow_sigmas=True.*below 1"),
    ("DPMSolverMultistep", {"solver_order": 0}, "solver_order=0"),
    (
        "DPMSolverMultistep",
        {"algorithm_type": "sde-dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"},
        "algorithm_type='sde-dpmsolver'.*solver_order=3",
    ),
    ("UniPCMultistep", {"solver_order": 4}, "solver_order=4"),
    ("UniPCMultistep", {"solver_type": "bh1"}, "solver_type='bh1'.*final_sigmas_type='sigma_min'"),
    ("UniPCMultistep", {"predict_x0": False}, "predict_x0=False.*final_sigmas_type='sigma_min'"),
    ("UniPCMultistep", {"lower_order_final": False}, "lower_order_final=False"),
    ("FlowMatchEulerDiscrete", {"invert_sigmas": True, "stochastic_sampling": True}, "stochastic_sampling=True"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED, ids=[f"{one[0]}: {one[2][:40]}" for one in REFUSED])
def test_options_without_an_equivalent_are_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastsample.from_diffusers(getattr(diffusers, f"{name}Scheduler")(**options), steps=4)


def test_an_option_that_is_not_known_is_refused_unless_it_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later version of diffusers may have one."""

    def init(self: Any, num_train_timesteps: int = 1000, shift: float = 1.0, twist: bool = False) -> None:
        raise AssertionError

    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    monkeypatch.setattr(diffusers.FlowMatchHeunDiscreteScheduler, "__init__", init)
    assert len(fastsample.from_diffusers(scheduler, steps=4).table) == 7
    scheduler._internal_dict = type(scheduler.config)({**scheduler.config, "twist": True})
    with pytest.raises(ValueError, match=re.escape("FlowMatchHeunDiscreteScheduler(twist=True)")):
        fastsample.from_diffusers(scheduler, steps=4)


@pytest.mark.parametrize(
    ("name", "steps", "arguments", "error", "message"),
    [
        ("DDIM", None, {}, ValueError, "no timesteps yet: give steps="),
        ("DDIM", 0, {}, ValueError, "steps must be at least 1"),
        ("DDIM", 2.5, {}, TypeError, "steps must be an int"),
        ("DDIM", 2000, {}, ValueError, r"DDIMScheduler.set_timesteps\(num_inference_steps=2000\) fails"),
        ("DDIM", 4, {"timesteps": [5]}, TypeError, "no argument timesteps: it takes steps alone"),
        ("DDIM", 4, {"eta": -1.0}, ValueError, "eta must be at least 0"),
        ("DDIM", 4, {"eta": "1"}, TypeError, "eta must be a number"),
        ("TCD", 4, {"eta": 1.5}, ValueError, "gamma must lie in"),
        ("EulerDiscrete", 4, {"eta": 1.0}, TypeError, "eta belongs to DDIMScheduler"),
        ("EulerDiscrete", 4, {"s_churn": 1.0}, TypeError, "no argument s_churn"),
        ("DPMSolverMultistep", 4, {"mu": 1.0}, ValueError, r"set_timesteps\(num_inference_steps=4, mu=1.0\) fails"),
        ("DPMSolverMultistep", None, {"timesteps": [9, 9, 5]}, ValueError, "first timestep 9 twice"),
        ("LCM", None, {"timesteps": [999, 500, 200], "strength": 0.7}, ValueError, "2 of 3 timesteps left"),
    ],
)
def test_arguments_are_checked(
    name: str, steps: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastsample.from_diffusers(getattr(diffusers, f"{name}Scheduler")(), steps, **arguments)


def close(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= grid.MOST_OF_SAMPLES * want.abs().max()


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "ScoreSdeVeScheduler", "UnCLIPScheduler"])
def test_no_conversion_is_advised_that_has_other_noise_levels(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    with pytest.raises(TypeError, match=f"{name} has no equivalent") as refused:
        fastsample.from_diffusers(scheduler, steps=4)
    assert "from_config" not in str(refused.value)
    with pytest.raises(TypeError, match=r"DPMSolverMultistepScheduler\.from_config"):
        fastsample.from_diffusers(diffusers.LMSDiscreteScheduler(), steps=4)
