"""What pipelines do with a scheduler beside its steps: callbacks, generators, dtypes, threads; those without texts."""

from __future__ import annotations

import threading
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from support.pipeline_pairs import (
    OTHER,
    SAME,
    SHRINKS,
    Run,
    check_pair,
    check_same,
    conditioned,
    draws,
    drop_in,
    in_dtype,
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


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("sd", name) for name in ("ddim", "ddpm", "lcm", "tcd", "dpm++2m-sde")), ("sdxl", "euler-ancestral")],
)
def test_a_generator_for_each_of_several_images_of_a_prompt(kind: str, name: str) -> None:
    eta = {"eta": 1.0} if name == "ddim" else {}

    def four(pipe: Any, last: int = 7) -> Run:
        generators = [draws(seed) for seed in (4, 5, 6, last)]
        return run(pipe, 4, samples=2, num_images_per_prompt=2, generator=generators, **eta)

    pipe = with_scheduler(kind, name)
    found = check_pair(pipe, four)
    other = four(pipe, last=8)
    assert np.abs(found.image[:3] - other.image[:3]).max() <= SAME / SHRINKS
    assert np.abs(found.image[3] - other.image[3]).max() > OTHER


# Of each kind of pipeline with callbacks, the schedulers that remember earlier steps among them; None is its own.
SEVERAL = [
    *(("sd", name) for name in ("ddim", "dpm++2m", "unipc", "lcm")),
    *(("sdxl", name) for name in ("euler", "dpm++3m", "unipc-bh1")),
    ("sd3", None),
    ("flux", None),
]


@pytest.mark.parametrize(("kind", "name"), SEVERAL)
def test_callbacks_that_change_the_state(kind: str, name: str | None) -> None:
    def changed(step: int, latents: torch.Tensor) -> torch.Tensor:
        return latents.flip(-1) if step == 1 else latents

    found = check_pair(with_scheduler(kind, name), lambda pipe: run(pipe, 5, after=changed))
    assert np.abs(found.image - run(with_scheduler(kind, name), 5).image).max() > OTHER


@pytest.mark.parametrize(("kind", "name"), SEVERAL)
def test_a_run_that_is_interrupted_and_another(kind: str, name: str | None) -> None:
    """Of what the first one has kept between its steps the second must know nothing."""

    def calls(pipe: Any) -> Run:
        def stop(step: int, latents: torch.Tensor) -> torch.Tensor:
            pipe._interrupt = step == 2
            return latents

        interrupted = run(pipe, 6, after=stop)
        assert len(interrupted.states) == 3
        whole = run(pipe, 4)
        return Run(whole.image, [*interrupted.states, *whole.states])

    check_pair(with_scheduler(kind, name), calls)


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")  # SDXL's own call of it
@pytest.mark.parametrize(
    ("dtype", "kind", "name"),
    [
        *((torch.bfloat16, *one) for one in SEVERAL),
        *((torch.bfloat16, "sd", name) for name in ("ddpm", "tcd", "euler", "euler-ancestral", "dpm++2m-sde")),
        *((torch.float16, "sd", name) for name in ("ddim", "lcm", "dpm++2m", "euler")),
        *((torch.float16, kind, None) for kind in ("sdxl", "flux")),
    ],
)
def test_networks_in_half_precision(dtype: torch.dtype, kind: str, name: str | None) -> None:
    pipe = in_dtype(with_scheduler(kind, name), dtype)
    theirs, ours = pair(pipe, lambda pipe: run(pipe, 3, guidance_scale=2.0))
    assert [one.dtype for one in ours.states] == [dtype] * 3
    # Their steps round each of up to ten operations to half a unit, ours the result, and the decoder rounds too.
    check_same(theirs, ours, near=10 * torch.finfo(dtype).eps)


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


@pytest.mark.parametrize(
    "given",
    [{"num_inference_steps": 1}, {"num_inference_steps": 5}, {"num_inference_steps": None, "timesteps": [22, 9, 0]}],
    ids=["1", "5", "timesteps"],
)
def test_consistency_model_pipeline(given: dict[str, Any]) -> None:
    pipe = unconditional(diffusers.ConsistencyModelPipeline, diffusers.CMStochasticIterativeScheduler())
    check_pair(pipe, lambda pipe: Run(pipe(batch_size=2, output_type="np", generator=draws(), **given).images))


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
