"""The numbers that diffusers' own tests of its schedulers hold them to, of these classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastsample.integrations.diffusers as ours

Golden = tuple[float | None, float]
LINEAR: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear", "num_train_timesteps": 1000}
SCALED: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONSISTENCY = {"num_train_timesteps": 201, "sigma_min": 0.002, "sigma_max": 80.0}
DDIM = {**LINEAR, "clip_sample": True}
LOWEST = {"final_sigmas_type": "sigma_min"}
DPM = {
    **LINEAR,
    "solver_order": 2,
    "thresholding": False,
    "sample_max_value": 1.0,
    "lower_order_final": False,
    **LOWEST,
}
THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.87, "sample_max_value": 0.5}
UNIPC = {**LINEAR, "solver_order": 2, "solver_type": "bh2", **LOWEST}
EULER = {**LINEAR, "num_train_timesteps": 1100}


def state() -> Tensor:
    return (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)


def noise() -> Tensor:
    return (torch.arange(768).flip(-1) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)


def model(x: Tensor, t: Tensor) -> Tensor:
    return x * t / (t + 1)


def run(scheduler: Any, x: Tensor, timesteps: Tensor, **given: Any) -> Tensor:
    for t in timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        if "Euler" in type(scheduler).__name__:
            x = seen  # as in their test
        x = scheduler.step(model(seen, t), t, x, **given).prev_sample
    return x


def check(x: Tensor, golden: Golden, near: float = 1.0) -> None:
    total, mean = golden
    assert total is None or abs(float(x.abs().sum()) - total) < near * 1e-2
    assert abs(float(x.abs().mean()) - mean) < 1e-3


V = {"prediction_type": "v_prediction"}
TEN_STEPS: dict[str, tuple[str, dict[str, Any], Golden]] = {
    "ddim": ("DDIM", DDIM, (172.0067, 0.223967)),
    "ddim-v": ("DDIM", {**DDIM, **V}, (52.5302, 0.0684)),
    "ddim-to-one": ("DDIM", {**DDIM, "set_alpha_to_one": True, "beta_start": 0.01}, (149.8295, 0.1951)),
    "ddim-to-first": ("DDIM", {**DDIM, "set_alpha_to_one": False, "beta_start": 0.01}, (149.0784, 0.1941)),
    "inverse": ("DDIMInverse", DDIM, (671.6816, 0.8746)),
    "inverse-v": ("DDIMInverse", {**DDIM, **V}, (1394.2185, 1.8154)),
    "inverse-to-one": ("DDIMInverse", {**DDIM, "set_alpha_to_one": True, "beta_start": 0.01}, (539.9622, 0.7031)),
    "inverse-to-first": ("DDIMInverse", {**DDIM, "set_alpha_to_one": False, "beta_start": 0.01}, (542.6722, 0.7066)),
    "tcd": ("TCD", SCALED, (181.2040, 0.2359)),
    "dpm": ("DPMSolverMultistep", DPM, (None, 0.3301)),
    "dpm-thresholded": ("DPMSolverMultistep", {**DPM, **THRESHOLD}, (None, 1.1364)),
    "dpm-v": ("DPMSolverMultistep", {**DPM, **V}, (None, 0.2251)),
    "dpm-v-karras": ("DPMSolverMultistep", {**DPM, **V, "use_karras_sigmas": True}, (None, 0.2096)),
    "unipc": ("UniPCMultistep", UNIPC, (None, 0.2464)),
    "unipc-karras": ("UniPCMultistep", {**UNIPC, "use_karras_sigmas": True}, (None, 0.2925)),
    "unipc-v": ("UniPCMultistep", {**UNIPC, **V}, (None, 0.1014)),
}


@pytest.mark.parametrize("case", TEN_STEPS)
def test_ten_steps(case: str) -> None:
    name, options, golden = TEN_STEPS[case]
    scheduler = getattr(ours, f"{name}Scheduler")(**options)
    scheduler.set_timesteps(10)
    check(run(scheduler, state(), scheduler.timesteps, **({"eta": 0.0} if name == "TCD" else {})), golden)


WITH_TORCHS_NOISE: dict[str, tuple[str, dict[str, Any], dict[str, Any], Golden]] = {
    "lcm-1": ("LCM", SCALED, {"num_inference_steps": 1}, (18.7097, 0.0244)),
    "lcm-10": ("LCM", SCALED, {"num_inference_steps": 10}, (197.7616, 0.2575)),
    "tcd-1": ("TCD", SCALED, {"num_inference_steps": 1}, (29.8715, 0.0389)),
    "consistency-1": ("CMStochasticIterative", CONSISTENCY, {"num_inference_steps": 1}, (192.7614, 0.2510)),
    "consistency-2": ("CMStochasticIterative", CONSISTENCY, {"timesteps": [106, 0]}, (347.6357, 0.4527)),
    "euler": ("EulerDiscrete", EULER, {"num_inference_steps": 10}, (10.0807, 0.0131)),
    "euler-ancestral": ("EulerAncestralDiscrete", EULER, {"num_inference_steps": 10}, (152.3192, 0.1983)),
}


@pytest.mark.parametrize("case", WITH_TORCHS_NOISE)
def test_with_torchs_noise_of_seed_0(case: str) -> None:
    name, options, timesteps, golden = WITH_TORCHS_NOISE[case]
    scheduler = getattr(ours, f"{name}Scheduler")(**options)
    scheduler.set_timesteps(**timesteps)
    source = torch.Generator().manual_seed(0)
    x = run(scheduler, state() * scheduler.init_noise_sigma, scheduler.timesteps, generator=source)
    check(x, golden, 0.1 if name in ("LCM", "TCD") else 1.0)


@pytest.mark.parametrize(
    ("prediction", "golden"),
    [("epsilon", (258.9606, 0.3372)), ("v_prediction", (202.0296, 0.2631))],
    ids=["epsilon", "v"],
)
def test_ddpm_in_all_timesteps(prediction: str, golden: Golden) -> None:
    scheduler = ours.DDPMScheduler(**LINEAR, clip_sample=True, prediction_type=prediction)
    source = torch.Generator().manual_seed(0)
    check(run(scheduler, state(), torch.arange(999, -1, -1), generator=source), golden)


@pytest.mark.parametrize(
    ("name", "options", "last", "golden"),
    [
        ("DDIM", DDIM, 2, (354.5418, 0.4616)),
        ("DDPM", DDIM, 2, (387.9466, 0.5051)),
        ("CMStochasticIterative", CONSISTENCY, 2, (763.9186, 0.9947)),
    ],
    ids=["ddim", "ddpm", "consistency"],
)
def test_from_a_noised_sample(name: str, options: dict[str, Any], last: int, golden: Golden) -> None:
    scheduler = getattr(ours, f"{name}Scheduler")(**options)
    scheduler.set_timesteps(1000 if name == "DDPM" else 10)
    timesteps = scheduler.timesteps[-last:]
    scale = 1.0 if name != "CMStochasticIterative" else scheduler.init_noise_sigma
    x = scheduler.add_noise(state() * scale, noise(), timesteps[:1])
    given = {} if name == "DDIM" else {"generator": torch.Generator().manual_seed(0)}
    check(run(scheduler, x, timesteps, **given), golden)


@pytest.mark.parametrize(
    ("name", "steps", "golden"),
    [("DDIM", 10, (1147.7904, 0.4982)), ("DDPM", None, (1153.1833, 0.5005))],
    ids=["ddim", "ddpm"],
)
def test_a_timestep_for_each_sample(name: str, steps: int | None, golden: Golden) -> None:
    """What diffusers has a class of its own for, the parallel one."""
    scheduler = getattr(ours, f"{name}Scheduler")(**DDIM)
    if steps:
        scheduler.set_timesteps(steps)
    x = torch.cat([state(), state() + 0.1, state() - 0.1])
    t = torch.arange(3).repeat_interleave(4)
    no_noise = torch.zeros_like(x)
    given = {} if name == "DDIM" else {"generator": torch.Generator()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastsample.integrations.diffusers.base.randn_tensor", lambda *_, **__: no_noise)
        out = scheduler.step(model(x, t.view(-1, 1, 1, 1)), t, x, **given).prev_sample
    check(out, golden)


@pytest.mark.parametrize(
    ("t", "then", "variance"),
    [(0, 0, 0.0), (420, 400, 0.14771), (980, 960, 0.32460), (487, 486, 0.00979), (999, 998, 0.02)],
)
def test_variances_of_ddim(t: int, then: int, variance: float) -> None:
    assert abs(float(ours.DDIMScheduler(**DDIM)._get_variance(t, then)) - variance) < 1e-5


@pytest.mark.parametrize(("t", "variance"), [(0, 0.0), (487, 0.00979), (999, 0.02)])
def test_variances_of_ddpm(t: int, variance: float) -> None:
    assert abs(float(ours.DDPMScheduler(**DDIM)._get_variance(t)) - variance) < 1e-5


def test_timesteps() -> None:
    ddim = ours.DDIMScheduler(**DDIM, steps_offset=1)
    ddim.set_timesteps(5)
    assert ddim.timesteps.tolist() == [801, 601, 401, 201, 1]
    ddpm = ours.DDPMScheduler(**DDIM)
    ddpm.set_timesteps(timesteps=[100, 87, 50, 1, 0])
    assert [int(ddpm.previous_timestep(t)) for t in ddpm.timesteps] == [87, 50, 1, 0, -1]
