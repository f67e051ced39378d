"""The tables, numbers and lists in docs/from-diffusers.md against diffusers."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastsample
from benchmarks import from_diffusers as grid
from benchmarks.cases.schedulers import CASES
from fastsample import Schedule, solver_timesteps, spaced_timesteps
from fastsample.ops.bend import METHODS
from fastsample.samplers.diffusers.door import KINDS
from support import diffusers_runs
from support import page_from_diffusers as page
from support.chains import toy_model
from support.page_from_diffusers import SECTIONS, close, first, guided_run, names_after, rows_of, said, torchs

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")  # which pipelines ask for

pytestmark = [
    pytest.mark.filterwarnings("ignore:x_T is drawn"),
    pytest.mark.filterwarnings("ignore:the row at"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

SCHEDULE = Schedule.scaled_linear()
SHAPE = (2, 4, 8, 8)


# From a live scheduler


def test_numbers_of_the_comparison() -> None:
    assert float(said(r"All of them agree within (\S+) of the largest value")) == grid.MOST_OF_SAMPLES
    assert float(said(r"the formulas in float64 within (\S+)\. ")) == grid.MOST_OF_ROWS
    assert int(said(r"For (\d+) of them, which it names")) == sum(bool(case.float64) for case in CASES)


def test_classes_are_those_with_an_equivalent() -> None:
    listed = re.sub(r" \(.*?\)", "", said(r"Of these schedulers all options are read: (.*?)\. "))
    names = {name.strip() for name in re.split(r",| and ", listed)} | {"DDIMParallel", "DDPMParallel"}
    assert {f"{name}Scheduler" for name in names} == KINDS.keys()


# Timesteps

SPACED = {"DDIM": "DDIM", "DDPM": "DDPM", "Euler": "EulerDiscrete", "Heun": "HeunDiscrete"}
SOLVERS = {"DPM-Solver++": "DPMSolverMultistep", "UniPC": "UniPCMultistep", "DEIS": "DEISMultistep"}


def test_columns_of_the_timesteps() -> None:
    assert f"| `timestep_spacing` | {', '.join(SPACED)} | {', '.join(SOLVERS)} |\n" in SECTIONS["Timesteps"]


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
@pytest.mark.parametrize("method", [*SPACED, *SOLVERS])
def test_timesteps_of_a_spacing(method: str, spacing: str, offset: int) -> None:
    name = f'`"{spacing}"`' + (f", `steps_offset={offset}`" if offset else "")
    [cells] = [cells for cell, *cells in rows_of("Timesteps", 3) if cell == name]
    shown = [float(number) for number in cells[method in SOLVERS].split(", ")]
    options = {**page.SCHEDULE, "timestep_spacing": spacing, "steps_offset": offset}
    scheduler = getattr(diffusers, f"{ {**SPACED, **SOLVERS}[method] }Scheduler".strip())(**options)
    made = getattr(fastsample, re.sub(r"\W", "", method))
    spaced = solver_timesteps if method in SOLVERS else spaced_timesteps
    for steps in (4, 7, 20, 50):
        scheduler.set_timesteps(steps)
        theirs = list(dict.fromkeys(scheduler.timesteps.tolist()))  # those of Heun stand twice
        given = spaced(1000, spacing, steps, steps_offset=offset) if offset else spacing
        ours = list(dict.fromkeys(made(SCHEDULE, steps=steps, timesteps=given).table.times))
        # Theirs are float32 between whole ones.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
        assert steps != 4 or theirs == shown


@pytest.mark.parametrize("steps", [1, 4, 7, 30])
def test_the_default_spacing(steps: int) -> None:
    assert (
        fastsample.DDIM(SCHEDULE, steps=steps).table
        == fastsample.DDIM(SCHEDULE, steps=steps, timesteps="trailing").table
    )


# Arguments


def arguments() -> dict[str, list[str]]:
    """Each argument of the table and the names of ours in its row."""
    names = {}
    for theirs, here in rows_of("Arguments", 2):
        if re.fullmatch(r"`\w+`(, `\w+`)*", theirs):
            names |= dict.fromkeys(re.findall(r"\w+", theirs), re.findall(r"`(\w+)`", here))
    return names


@pytest.mark.parametrize("name", [name for name, here in arguments().items() if name not in here])
def test_an_argument_of_theirs_is_told_the_name_here(name: str) -> None:
    with pytest.raises(TypeError) as refused:
        fastsample.euler(toy, SHAPE, schedule=SCHEDULE, **{name: None})
    assert any(f"{here}=" in str(refused.value) for here in arguments()[name]), refused.value


@pytest.mark.parametrize("name", [name for name, here in arguments().items() if name in here])
def test_an_argument_that_has_the_same_name(name: str) -> None:
    assert name in inspect.signature(fastsample.ddim).parameters or name in fastsample.Options.__annotations__


def toy(x: Tensor, t: Tensor, c: Tensor | float = 0.0) -> Tensor:
    return 0.6 * torch.tanh(x + c) + 0.2


@pytest.mark.parametrize("guider", ["ClassifierFree", "ClassifierFreeZeroStar", "AdaptiveProjected"])
def test_a_guider(guider: str) -> None:
    """By its defaults, over a whole chain."""
    theirs = getattr(pytest.importorskip("diffusers.guiders"), f"{guider}Guidance")()
    scheduler = diffusers.DDIMScheduler(**page.STABLE_DIFFUSION)
    scheduler.set_timesteps(20)
    c, z = fastsample.ops.randn((2, *SHAPE), seed=3)
    x = first("noise")
    [cell] = [cell for row, cell in rows_of("Arguments", 2) if row == f"the guider `{guider}Guidance()`"]
    weighed = eval(cell.strip("`").removeprefix("guidance="), {"fastsample": fastsample})
    got = guided_run(x=x, model=toy, guidance=weighed, cond={"c": c}, uncond={"c": z})
    for k, t in enumerate(scheduler.timesteps):
        theirs.set_state(step=k, num_inference_steps=20, timestep=t)
        theirs.prepare_inputs({"x": (x, x)})
        x = scheduler.step(theirs.forward(toy(x, t, c), toy(x, t, z)).pred, t, x).prev_sample
    close(got, x)


def test_a_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    unets = [diffusers.UNet2DConditionModel(**first("small")).eval() for _ in range(2)]
    unets[1].load_state_dict(unets[0].state_dict())
    factors = {}
    for path, linear in unets[0].named_modules():
        if path.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            factors[f"unet.{path}.lora_A.weight"] = 0.1 * torch.randn(4, linear.in_features, generator=torchs())
            factors[f"unet.{path}.lora_B.weight"] = 0.1 * torch.randn(linear.out_features, 4, generator=torchs(1))
    save_file(factors, "style.safetensors")
    [(theirs, ours)] = [row for row in rows_of("Arguments", 2) if "load_lora_weights" in row[0]]
    bare = guided_run(model=unets[0])
    eval(theirs.strip("`"), {"pipe": page.stable_diffusion(unet=unets[0]).pipe})
    exec(ours.split("`")[1], {"fastsample": fastsample, "unet": unets[1]})
    want = guided_run(model=unets[0])
    close(guided_run(model=unets[1]), want)
    assert (want - bare).abs().max() > 0.1


# Callbacks


def test_what_a_callback_gets() -> None:
    cells = {theirs: here.strip("`") for theirs, here in rows_of("Callbacks", 2)}
    seen: list[tuple[Any, ...]] = []

    def theirs(pipe: Any, i: int, t: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, int(t), kwargs["latents"]))
        return {"latents": 0.9 * kwargs["latents"]}

    steps: list[tuple[Any, ...]] = []

    def callback(step: fastsample.Step) -> None:
        i, t, x = (eval(cells[name], {"step": step}) for name in ("`i`", "`t`", '`kwargs["latents"]`'))
        steps.append((i, t, x.clone()))
        exec(cells['returns `{"latents": y}`'], {"step": step, "y": 0.9 * step.x})

    want = page.stable_diffusion()(num_inference_steps=20, latents=first("noise"), callback_on_step_end=theirs)
    close(guided_run(x=first("noise"), callback=callback), want)
    for (i, t, x), (index, time, state) in zip(seen, steps, strict=True):
        assert (i, t) == (index, time)
        close(state, x)
    named = {name for cell in cells.values() for name in re.findall(r"step\.(\w+)", cell)}
    assert named | {"alpha", "sigma"} == {field.name for field in fields(fastsample.Step)}


def test_the_sample_that_a_callback_gets() -> None:
    scheduler = diffusers.DDIMScheduler(**page.STABLE_DIFFUSION)
    scheduler.set_timesteps(20)
    x = first("noise")
    for step, t in zip(fastsample.DDIM(**first("stable_diffusion")).iterate(toy, x), scheduler.timesteps, strict=True):
        output = scheduler.step(toy(x, t), t, x)
        x = output.prev_sample
        close(step.x0, output.pred_original_sample)


def test_the_early_end() -> None:
    [(theirs, ours)] = [row for row in rows_of("Arguments", 2) if "_interrupt" in row[0]]

    def interrupt(pipe: Any, i: int, t: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        if i == 7:
            exec(theirs.split("`")[1], {"pipe": pipe})
        return {}

    def stop(step: fastsample.Step) -> None:
        if step.index == 7:
            exec(ours.strip("`"), {"fastsample": fastsample})

    want = page.stable_diffusion()(num_inference_steps=20, latents=first("noise"), callback_on_step_end=interrupt)
    close(guided_run(x=first("noise"), callback=stop), want)


# Flow matching


def test_flux_shift() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    names = names_after()["Flow matching: Flux"]
    [formula] = re.findall(r"^mu = (.*)$", SECTIONS["Flow matching"], flags=re.MULTILINE)
    for tokens in (64, 256, 1024, 4096, 8100):
        assert eval(formula, {"tokens": tokens}) == pytest.approx(calculate_shift(tokens), rel=1e-12)
    around = {"fastsample": fastsample, "np": np, "pipe": page.flux().pipe, "mu": names["mu"]}
    sampler = eval(said(r"`(fastsample\.from_diffusers\(pipe\.scheduler, sigmas=.*?mu=mu\))` makes"), around)
    close(sampler(names["transformer"], names["packed"], model_kwargs=names["keywords"]), names["latents"])


def test_dynamic_shifting_of_stable_diffusion_3() -> None:
    names, mu = names_after()["Flow matching: Stable Diffusion 3"], 0.8
    pipe = page.stable_diffusion_3(use_dynamic_shifting=True)
    around = {"fastsample": fastsample, "pipe": pipe.pipe, "mu": mu}
    sampler = eval(said(r"`use_dynamic_shifting`, take `(fastsample\.from_diffusers\(.*?\))` instead"), around)
    got = sampler(
        lambda x, t, **keywords: names["sd3"](x, timestep=t, **keywords),
        names["noise"],
        guidance=7.0,
        cond={"encoder_hidden_states": names["prompt"], "pooled_projections": names["pooled"]},
        uncond={"encoder_hidden_states": names["empty"], "pooled_projections": names["empty_pooled"]},
    )
    close(got, pipe(num_inference_steps=28, guidance_scale=7.0, latents=names["noise"], mu=mu))


def test_flux_without_dynamic_shifting() -> None:
    names, shift = names_after()["Flow matching: Flux"], float(said(r"no dynamic shifting takes `shift=(\S+)` here"))
    options = {"steps": 4, "prediction": "flow", "timesteps": "trailing", "shift": shift}
    got = fastsample.euler(names["transformer"], names["packed"], model_kwargs=names["keywords"], **options)
    pipe = page.flux(shift=float(said(r"A Flux whose scheduler has `shift=(\S+)` and no dynamic")))
    close(got, pipe(num_inference_steps=4, guidance_scale=3.5, latents=names["packed"]))


def test_noise_of_a_flow() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    x, z = fastsample.ops.randn((2, *SHAPE), seed=1)
    t = scheduler.timesteps[[100, 600]]
    close(fastsample.add_noise(x, t, prediction="flow", noise=z), scheduler.scale_noise(x, t, z))


# Where the two differ


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ddim_strays(spacing: str) -> None:
    """Over the chain that the page tells of."""
    percent, steps = re.findall(rf'(\d+) %[a-z ]* at (\d+)[a-z ]* of "{spacing}"', SECTIONS["Where the two differ"])[0]
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(int(steps))
    x = fastsample.ops.randn((2, 3, 8, 8), seed=5)
    theirs = diffusers_runs.chain(scheduler, toy_model, x)
    ours = fastsample.ddim(toy_model, x, steps=int(steps), timesteps=spacing)
    off = (theirs - ours).abs().max() / theirs.abs().max()
    assert f"{off:.0%}" == f"{percent}%"


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("name", ["Euler", "Heun"])
def test_the_deviation_of_the_first_x(name: str, spacing: str) -> None:
    scheduler = getattr(diffusers, f"{name}DiscreteScheduler")(**page.SCHEDULE, timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    sampler = getattr(fastsample, name)(SCHEDULE, steps=20, timesteps=spacing)
    assert sampler.table.init_noise_sigma == 1
    alpha = float(sampler.table.alpha[0])
    lacks = 1 - alpha * float(scheduler.init_noise_sigma)
    assert lacks == pytest.approx(1 - (1 - alpha**2) ** 0.5, abs=1e-6)
    assert f"{lacks:.1%}" == said(r"1 - sqrt\(1 - alpha bar\) \((\S+) % for Stable Diffusion\)") + "%"


@pytest.mark.parametrize(("spacing", "theirs"), [("leading", 0), ("linspace", 0), ("trailing", 999)])
def test_a_single_step(spacing: str, theirs: int) -> None:
    assert fastsample.DDIM(SCHEDULE, steps=1, timesteps=spacing).table.t.tolist() == [999]
    scheduler = diffusers.DDIMScheduler(**{**page.SCHEDULE, "steps_offset": 0}, timestep_spacing=spacing)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [theirs]
    assert (f'"{spacing}"' in said(r"takes it from timestep 0 with (.*?)\. ")) == (theirs == 0)


def test_a_learned_variance() -> None:
    scheduler = diffusers.DDPMScheduler(**page.SCHEDULE, clip_sample=False, variance_type="learned")
    scheduler.set_timesteps(timesteps=[500, 0])
    x, learned = first("noise"), torch.full(SHAPE, 0.25)
    means, z = 2 * [torch.zeros(SHAPE)], torch.ones(SHAPE)
    model = lambda x, t: torch.cat([0.1 * x, learned], dim=1)  # noqa: E731
    sampler = fastsample.DDPM(SCHEDULE, timesteps=[500, 0], variance="learned")
    means[0], noisy = (
        next(sampler.iterate(model, x, noise=lambda k, noise=noise: noise)).x.clone() for noise in (0 * z, z)
    )
    close(noisy - means[0], (learned / 2).exp())
    with pytest.MonkeyPatch.context() as patch:
        results = []
        for noise in (0 * z, z):
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise)
            results.append(scheduler.step(model(x, None), 500, x).prev_sample)
    close(results[1] - results[0], learned.sqrt())
    close(results[0], means[0])


# What is not here


def named(kind: str, ending: str) -> list[str]:
    return re.findall(rf"\w+{ending}\b", said(rf"\*\*{kind}\*\*(.*?)- \*\*"))


@pytest.mark.parametrize("name", named("Schedulers", "Scheduler"))
def test_a_scheduler_that_is_not_here(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} has no equivalent"):
        fastsample.from_diffusers(getattr(diffusers, name)(), steps=4)


def test_guiders_that_are_not_here() -> None:
    guiders = pytest.importorskip("diffusers.guiders")
    missing = named("The guiders", "Guidance")
    assert len(missing) == 6 and all(hasattr(guiders, name) for name in missing)
    assert METHODS == ("plain", "cfg_zero_star", "apg")


def test_spacings_of_live_schedulers_alone() -> None:
    pytest.importorskip("scipy")
    listed = re.findall(r"`(use_\w+)`", said(r"\*\*Spacings\*\*(.*?)- \*\*"))
    made = {
        "use_beta_sigmas": diffusers.EulerDiscreteScheduler(use_beta_sigmas=True),
        "use_flow_sigmas": diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    }
    assert set(listed) == made.keys()
    for scheduler in made.values():
        assert len(fastsample.from_diffusers(scheduler, steps=4).table) == 4


def test_churn_and_pipelines() -> None:
    with pytest.raises(TypeError, match="no argument s_churn"):
        fastsample.euler(toy, SHAPE, schedule=SCHEDULE, s_churn=1.0)
    assert not hasattr(fastsample.DDIM(SCHEDULE, steps=4), "set_timesteps")
