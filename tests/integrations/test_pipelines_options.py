"""What pipelines do with a scheduler beside its steps: files, callbacks, generators, dtypes; those without texts."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import fastsample.integrations.diffusers as drop_ins
from support.pipeline_pairs import (
    OTHER,
    Run,
    check_pair,
    check_same,
    conditioned,
    draws,
    drop_in,
    pair,
    run,
    unconditional,
    with_scheduler,
)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_eta(eta: float) -> None:
    found = check_pair(with_scheduler("sd", "ddim"), lambda pipe: run(pipe, 5, eta=eta))
    if eta:
        without = run(with_scheduler("sd", "ddim"), 5)
        assert np.abs(found.image - without.image).max() > OTHER


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm", "euler-ancestral", "dpm++2m-sde"])
def test_a_generator_for_each_image(name: str) -> None:
    eta = {"eta": 1.0} if name == "ddim" else {}

    def both(pipe: Any) -> Run:
        return run(pipe, 4, samples=2, generator=[draws(4), draws(5)], **eta)

    found = check_pair(with_scheduler("sd", name), both)
    pipe = with_scheduler("sd", name)
    pipe.scheduler = drop_in(pipe.scheduler)
    other = run(pipe, 4, samples=2, generator=[draws(4), draws(6)], **eta)
    assert np.abs(found.image[0] - other.image[0]).max() <= 1e-5
    assert np.abs(found.image[1] - other.image[1]).max() > OTHER


@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "unipc", "euler"])
def test_callbacks_that_change_the_state(name: str) -> None:
    def half(step: int, latents: torch.Tensor) -> torch.Tensor:
        return latents * (0.5 if step == 1 else 1.0)

    found = check_pair(with_scheduler("sd", name), lambda pipe: run(pipe, 5, after=half))
    assert np.abs(found.image - run(with_scheduler("sd", name), 5).image).max() > OTHER


@pytest.mark.parametrize("name", ["ddim", "dpm++2m"])
def test_a_run_that_is_interrupted(name: str) -> None:
    def calls(pipe: Any) -> Run:
        def stop(step: int, latents: torch.Tensor) -> torch.Tensor:
            pipe._interrupt = step == 2
            return latents

        interrupted = run(pipe, 6, after=stop)
        assert len(interrupted.states) == 3
        return interrupted

    check_pair(with_scheduler("sd", name), calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm", "dpm++2m", "euler", "unipc"])
def test_networks_in_half_precision(name: str, dtype: torch.dtype) -> None:
    pipe = with_scheduler("sd", name)
    for part in ("unet", "vae", "text_encoder"):  # which other tests share
        setattr(pipe, part, copy.deepcopy(getattr(pipe, part)).to(dtype))
    theirs, ours = pair(pipe, lambda pipe: run(pipe, 3))
    # Their steps round every operation, ours the result: a few roundings each of values that are up to 16.
    assert [one.dtype for one in ours.states] == [one.dtype for one in theirs.states] == [dtype] * 3
    check_same(Run(theirs.image), Run(ours.image), near=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["ddim", "dpm++2m-karras", "euler-ancestral", "unipc"])
def test_saved_and_loaded(tmp_path: Path, name: str) -> None:
    pipe = with_scheduler("sd", name)
    theirs = run(pipe)
    pipe.scheduler = drop_in(pipe.scheduler)
    kind = type(pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "fastsample.integrations.diffusers",
        kind.__name__,
    ]
    for load in (type(pipe), diffusers.DiffusionPipeline):
        # What it was made without has to be said again, as with diffusers' schedulers.
        again = load.from_pretrained(tmp_path, tokenizer=None, safety_checker=None, feature_extractor=None)
        again.set_progress_bar_config(disable=True)
        assert type(again.scheduler) is kind
        check_same(theirs, run(again))
    back = getattr(diffusers, kind.__name__).from_pretrained(tmp_path / "scheduler")
    assert type(back) is getattr(diffusers, kind.__name__)


def test_there_and_back_by_configurations() -> None:
    pipe = with_scheduler("sd", "dpm++2m")
    want = run(pipe)
    pipe.scheduler = drop_ins.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = drop_ins.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    check_same(want, run(pipe))
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert np.array_equal(run(pipe).image, want.image)


def image_of(pipe: Any, **options: Any) -> Run:
    return Run(pipe(batch_size=2, num_inference_steps=5, output_type="np", generator=draws(), **options).images)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_pipeline(eta: float) -> None:
    pipe = unconditional(diffusers.DDIMPipeline, diffusers.DDIMScheduler())
    check_pair(pipe, lambda pipe: image_of(pipe, eta=eta, use_clipped_model_output=bool(eta)))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
def test_ddpm_pipeline(variance: str) -> None:
    learned = variance == "learned_range"
    scheduler = diffusers.DDPMScheduler(variance_type=variance)
    check_pair(unconditional(diffusers.DDPMPipeline, scheduler, out_channels=6 if learned else 3), image_of)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_latent_consistency_pipeline(steps: int) -> None:
    pipe = conditioned("lcm")
    check_pair(pipe, lambda pipe: run(pipe, steps, original_inference_steps=50, guidance_scale=4.0))


def test_compat_makes_the_image_of_diffusers_where_it_is_mistaken() -> None:
    """With "linspace" DDIM steps lead to t - T // N there, and to the next timestep here."""
    theirs, ours = pair(with_scheduler("sd", "ddim", timestep_spacing="linspace"), run)
    assert np.abs(ours.image - theirs.image).max() > OTHER
    check_pair(with_scheduler("sd", "ddim", timestep_spacing="linspace"), run, compat="diffusers")


def test_pipelines_in_threads_share_a_scheduler() -> None:
    scheduler = drop_in(with_scheduler("sd", "ddim").scheduler)
    pipes = [with_scheduler("sd", "ddim") for _ in range(4)]
    for pipe in pipes:
        pipe.scheduler = scheduler
    want = [run(pipe, 5, generator=draws(seed)).image for seed, pipe in enumerate(pipes)]
    got: dict[int, Any] = {}

    def work(seed: int) -> None:
        got[seed] = run(pipes[seed], 5, generator=draws(seed)).image

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(got[seed], image) for seed, image in enumerate(want))
