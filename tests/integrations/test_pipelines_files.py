"""Pipelines with a drop-in scheduler on disk, and schedulers that are exchanged by their configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import fastsample.integrations.diffusers as drop_ins
from fastsample import accelerate
from support.pipeline_pairs import (
    OTHER,
    Run,
    check_same,
    conditioned,
    draws,
    drop_in,
    pair,
    run,
    unconditional,
    with_scheduler,
)
from support.small_pipelines import quiet

MENDED = pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")


def missing(pipe: Any) -> dict[str, None]:
    """What a pipeline was made without, which has to be said again where it is loaded."""
    return {name: None for name, part in pipe.components.items() if part is None}


def options(scheduler: Any) -> dict[str, Any]:
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


@pytest.mark.parametrize(
    ("kind", "name", "compat"),
    [
        ("sd", "ddim", "diffusers"),
        ("sd", "dpm++2m-karras", None),
        ("sdxl", "unipc", None),
        ("sdxl", "euler-ancestral", "diffusers"),
        ("flux", None, None),
    ],
)
def test_saved_and_loaded(tmp_path: Path, kind: str, name: str | None, compat: Any) -> None:
    pipe = with_scheduler(kind, name)
    theirs = run(pipe)
    pipe.scheduler = drop_in(pipe.scheduler, compat=compat)
    own = type(pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "model_index.json").read_text())["scheduler"]
    assert written == ["fastsample.integrations.diffusers", own.__name__]
    for load in (type(pipe), diffusers.DiffusionPipeline):
        again = quiet(load.from_pretrained(tmp_path, **missing(pipe)))
        assert type(again) is type(pipe) and type(again.scheduler) is own and again.scheduler.compat == compat
        assert options(again.scheduler) == options(pipe.scheduler)
        check_same(theirs, run(again))


def test_files_serve_either_class(tmp_path: Path) -> None:
    pipe = with_scheduler("sd", "dpm++2m")
    want = run(pipe)
    (theirs, ours) = pipe.scheduler, drop_in(pipe.scheduler)
    for saved in (theirs, ours):
        pipe.scheduler = saved
        pipe.save_pretrained(tmp_path / type(saved).__module__)
        for kind in (diffusers.DPMSolverMultistepScheduler, drop_ins.DPMSolverMultistepScheduler):
            scheduler = kind.from_pretrained(tmp_path / type(saved).__module__, subfolder="scheduler")
            given = {**missing(pipe), "scheduler": scheduler}
            again = quiet(type(pipe).from_pretrained(tmp_path / type(saved).__module__, **given))
            assert type(again.scheduler) is kind
            check_same(want, run(again))


def test_an_unconditional_pipeline_saved_and_loaded(tmp_path: Path) -> None:
    def image_of(pipe: Any) -> Run:
        return Run(pipe(num_inference_steps=3, output_type="np", generator=draws()).images)

    pipe = unconditional(diffusers.DDPMPipeline, diffusers.DDPMScheduler(variance_type="fixed_large"))
    want = image_of(pipe)
    pipe.scheduler = drop_in(pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(again.scheduler) is drop_ins.DDPMScheduler
    check_same(want, image_of(again))


def test_loaded_and_cast(tmp_path: Path) -> None:
    pipe = with_scheduler("sd", "euler")
    pipe.scheduler = drop_in(pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    again = quiet(type(pipe).from_pretrained(tmp_path, **missing(pipe)).to(torch.bfloat16))
    assert type(again.scheduler) is drop_ins.EulerDiscreteScheduler
    found = run(again)
    assert found.states[-1].dtype == torch.bfloat16 and np.isfinite(found.image).all()


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("sd", name) for name in ("ddim", "lcm", "dpm++2m", "unipc-bh1")), ("sdxl", "euler-karras"), ("sd3", None)],
)
def test_there_and_back_by_configurations(kind: str, name: str | None) -> None:
    pipe = with_scheduler(kind, name)
    want, before = run(pipe), pipe.scheduler
    pipe.scheduler = drop_in(before)
    check_same(want, run(pipe))
    pipe.scheduler = type(before).from_config(pipe.scheduler.config)
    assert type(pipe.scheduler) is type(before) and options(pipe.scheduler) == options(before)
    assert np.array_equal(run(pipe).image, want.image)


def test_there_and_back_by_another_scheduler() -> None:
    """Whose configuration carries what it does not know."""
    pipe = with_scheduler("sd", "dpm++2m-karras")
    want = run(pipe)
    pipe.scheduler = drop_ins.DDIMScheduler.from_config(pipe.scheduler.config)
    assert np.abs(run(pipe).image - want.image).max() > OTHER
    pipe.scheduler = drop_ins.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    check_same(want, run(pipe))


def test_another_pipeline_of_the_same_parts() -> None:
    def both(pipe: Any) -> Run:
        text = run(pipe)
        other = quiet(diffusers.AutoPipelineForImage2Image.from_pipe(pipe, requires_safety_checker=False))
        assert isinstance(other, diffusers.StableDiffusionImg2ImgPipeline) and other.scheduler is pipe.scheduler
        image = run(other, 4, image=torch.from_numpy(text.image).permute(0, 3, 1, 2), strength=0.5)
        return Run(image.image, [*text.states, *image.states])

    check_same(*pair(with_scheduler("sd", "dpm++2m"), both))


def mended(scheduler: Any) -> Any:
    """In a pipeline of Stable Diffusion, which sets steps_offset=1 and clip_sample=False in one that has neither."""
    parts = {**conditioned("sd").components, "scheduler": scheduler}
    pipe = quiet(diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False))
    assert pipe.scheduler is scheduler and scheduler.config.steps_offset == 1
    assert not scheduler.config.get("clip_sample")
    return pipe


OLD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@MENDED
def test_a_pipeline_that_mends_the_configuration_of_its_scheduler() -> None:
    """Of one that has been made, and has run."""
    images = []
    for kind in (diffusers.DDIMScheduler, drop_ins.DDIMScheduler):
        scheduler = kind(**OLD)
        scheduler.set_timesteps(4)
        scheduler.step(torch.ones(1, 4, 8, 8), scheduler.timesteps[0], torch.ones(1, 4, 8, 8))
        images.append(run(mended(scheduler)))
    check_same(*images)


@MENDED
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "UniPCMultistepScheduler"])
def test_a_mended_configuration_in_place(name: str) -> None:
    """diffusers' own from_config forgets it."""
    pipe = mended(getattr(diffusers, name)(**OLD))
    theirs, want = pipe.scheduler, run(pipe)
    for scheduler in (drop_ins.same_as(theirs), getattr(drop_ins, name).from_config(theirs.config)):
        pipe.scheduler = scheduler
        check_same(want, run(pipe))
        assert pipe.scheduler.config.steps_offset == 1
    pipe.scheduler = theirs
    accelerate(pipe)
    check_same(want, run(pipe))
