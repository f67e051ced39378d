"""The examples in docs/from-diffusers.md against live pipelines of diffusers, whose models are those of the page."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample
from support import page_from_diffusers as page
from support.chains import toy_model
from support.page_from_diffusers import PIPELINES, SECTIONS, close, first, guided_run, names_after, said, torchs

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")  # which pipelines ask for

pytestmark = [
    pytest.mark.filterwarnings("ignore:x_T is drawn"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]

SCHEDULE = fastsample.Schedule.scaled_linear()
SHAPE = (2, 4, 8, 8)


def pipeline(**arguments: Any) -> Any:
    """The result of StableDiffusionPipeline as the first example has it."""
    given = {"num_inference_steps": 20, "guidance_scale": 7.5, "generator": torchs(), **arguments}
    return page.stable_diffusion()(**given)


@pytest.mark.parametrize("title", PIPELINES)
def test_an_example_is_its_pipeline(title: str) -> None:
    close(names_after()[title]["latents"], page.of_pipeline(title))


def test_every_example_with_a_pipeline_is_compared() -> None:
    found = [title for title, section in SECTIONS.items() for _ in page.CALLED.findall(section)]
    assert found == [title.partition(":")[0] for title in PIPELINES]
    assert len(found) == page.PAGE.count("# pipe(")


# A first run


def test_the_solver_in_its_place() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**page.SCHEDULE, timestep_spacing="leading")
    timesteps = eval(said(r"`fastsample.dpm_solver` with `timesteps=(.*?\))`"), vars(fastsample))
    x = first("noise")
    got = guided_run(fastsample.DPMSolver(first("schedule"), timesteps=timesteps), x)
    close(got, page.stable_diffusion(scheduler)(num_inference_steps=20, guidance_scale=7.5, latents=x))


def test_a_pipeline_with_pndm_has_an_equivalent_by_its_config() -> None:
    pndm = diffusers.PNDMScheduler(**page.SCHEDULE, set_alpha_to_one=False, skip_prk_steps=True)
    with pytest.raises(TypeError, match="no equivalent"):
        fastsample.from_diffusers(pndm, steps=20)
    pipe = page.stable_diffusion(diffusers.DDIMScheduler.from_config(pndm.config))
    sampler = fastsample.from_diffusers(pipe.pipe.scheduler, steps=20)
    close(guided_run(sampler), pipe(num_inference_steps=20, guidance_scale=7.5, generator=torchs()))


def test_a_model_of_diffusers_has_no_schedule() -> None:
    x = first("noise")
    with pytest.warns(UserWarning, match="Schedule.linear"):
        got = fastsample.ddim(first("unet"), x, steps=2, cond=first("guided")["cond"])
    assumed = eval(said(r"Without it `(Schedule\.\S+\))` is assumed"), vars(fastsample))
    assert torch.equal(got, fastsample.ddim(first("unet"), x, steps=2, cond=first("guided")["cond"], schedule=assumed))


def test_the_schedule_of_checkpoints() -> None:
    """As diffusers assumes it for single files of Stable Diffusion and SDXL."""
    config = pytest.importorskip("diffusers.loaders.single_file_utils").SCHEDULER_DEFAULT_CONFIG
    assert {**page.SCHEDULE, "timestep_spacing": "leading", "set_alpha_to_one": False}.items() <= config.items()
    schedule = fastsample.Schedule.from_alphas_cumprod(diffusers.DDIMScheduler(**page.SCHEDULE).alphas_cumprod)
    np.testing.assert_allclose(first("schedule").alphas_cumprod, schedule.alphas_cumprod, rtol=1e-5)


# Arguments


def test_guidance_rescale() -> None:
    close(guided_run(guidance_rescale=0.7), pipeline(guidance_rescale=0.7))


def test_guidance_up_to_1() -> None:
    unguided = fastsample.DDIM(**first("stable_diffusion"))(first("unet"), first("noise"), cond=first("guided")["cond"])
    close(unguided, pipeline(guidance_scale=0.5))
    assert torch.equal(guided_run(x=first("noise"), guidance=1.0), unguided)
    assert (guided_run(x=first("noise"), guidance=0.5) - unguided).abs().max() > 1e-3 * unguided.abs().max()


def test_timesteps_are_taken_as_they_are() -> None:
    given = [999, 700, 401, 33]
    scheduler = diffusers.EulerDiscreteScheduler(**page.SCHEDULE)
    want = page.stable_diffusion(scheduler)(timesteps=given, latents=first("noise"), guidance_scale=7.5)
    sigma = float(scheduler.init_noise_sigma)
    sampler = fastsample.Euler(first("schedule"), timesteps=given)
    close(guided_run(sampler, first("noise") * (sigma / (sigma**2 + 1) ** 0.5)), want)


def test_images_per_prompt_are_the_batch() -> None:
    one = {name: value[:1] for name, value in page.texts_of(names_after()["A first run"]).items()}
    got = guided_run(
        cond={"encoder_hidden_states": one["prompt_embeds"].repeat(2, 1, 1)},
        uncond={"encoder_hidden_states": one["negative_prompt_embeds"].repeat(2, 1, 1)},
    )
    close(got, pipeline(num_images_per_prompt=2, **one))


# Noise and latents


def test_a_list_of_generators() -> None:
    generators = [torchs(seed) for seed in (3, 4)]
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators])
    got = guided_run(fastsample.DDIM(**first("stable_diffusion"), eta=1.0), x, noise=generators)
    close(got, pipeline(eta=1.0, generator=[torchs(seed) for seed in (3, 4)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's x_T is drawn in its model's dtype; its latents stay in that, ours do not."""
    unet, vae = (copy.deepcopy(first(name)).to(dtype) for name in ("unet", "vae"))
    pipe = page.stable_diffusion(unet=unet, vae=vae)
    kept: list[Tensor] = []
    prepare = pipe.pipe.prepare_latents
    kept_too = lambda *arguments: kept.append(prepare(*arguments)) or kept[0]  # noqa: E731
    monkeypatch.setattr(pipe.pipe, "prepare_latents", kept_too)
    texts = {name: value.to(dtype) for name, value in page.texts_of(names_after()["A first run"]).items()}
    states: list[torch.dtype] = []
    keep = lambda pipe, i, t, kwargs: states.append(kwargs["latents"].dtype) or {}  # noqa: E731
    pipe(num_inference_steps=2, generator=torchs(), callback_on_step_end=keep, **texts)
    assert torch.equal(kept[0], torch.randn(2, 4, 8, 8, generator=torchs(), dtype=dtype)) and states == [dtype] * 2
    states.clear()
    sampler = fastsample.DDIM(first("schedule"), steps=2)
    ours = guided_run(sampler, kept[0], model=unet, callback=lambda step: states.append(step.x.dtype))
    assert states == [torch.float32] * 2 and ours.dtype == torch.float32


@pytest.mark.parametrize("name", ["Euler", "Heun"])
def test_states_are_alpha_times_those_of_euler_and_heun(name: str) -> None:
    scheduler = getattr(diffusers, f"{name}DiscreteScheduler")(**page.SCHEDULE, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    sampler = getattr(fastsample, name)(first("schedule"), steps=4, timesteps="trailing")
    sigma = float(scheduler.init_noise_sigma)
    theirs = first("noise") * sigma
    for k, step in enumerate(sampler.iterate(lambda x, t: 0.3 * x, theirs / (sigma**2 + 1) ** 0.5)):
        t = scheduler.timesteps[k]
        theirs = scheduler.step(0.3 * scheduler.scale_model_input(theirs, t), t, theirs).prev_sample
        close(step.x, step.alpha * theirs)


# Keywords under guidance


def keywords_given(**values: Any) -> dict[str, Any]:
    """What a model of 2 samples is given of keywords that are the same in both halves."""
    given: dict[str, Any] = {}

    def model(x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        given.update(keywords)
        return 0.1 * x

    fastsample.ddim(model, (2, 3), steps=1, guidance=2.0, cond=values, uncond=values)
    return given


def test_keywords_are_told_apart_by_their_types() -> None:
    table, entries = torch.ones(5), torch.ones(2, 3)
    given = keywords_given(
        c=entries, residuals=(entries, entries), names=["a", "b"], none=None, text="a", table=fastsample.Shared(table)
    )
    assert given["c"].shape == (4, 3) and [entry.shape for entry in given["residuals"]] == [(4, 3)] * 2
    assert given["names"] == ["a", "b"] * 2 and given["none"] is None and given["text"] == "a"
    assert torch.equal(given["table"], table)


@pytest.mark.parametrize("entries", [4, 1])
def test_a_tensor_has_an_entry_per_sample(entries: int) -> None:
    with pytest.raises(ValueError, match="first axis counts the samples"):
        keywords_given(time_ids=torch.ones(entries, 6))


@pytest.mark.parametrize(("cast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_keywords_are_cast_to_the_dtype_of_the_unet(cast: bool, dtype: torch.dtype) -> None:
    seen = []

    class UNet(torch.nn.Module):
        dtype, schedule = torch.bfloat16, fastsample.Schedule.linear()

        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            seen.append(c.dtype)
            return 0.1 * x

    fastsample.ddim(UNet().eval(), (2, 3), steps=1, model_kwargs={"c": torch.ones(2, 3)}, cast_kwargs=cast)
    assert seen == [dtype]


# The VAE


def decoder(config: str, vae: Any) -> Callable[[Tensor], Any]:
    """The page's line for a VAE with this in its config."""
    [cell] = [cell for row, cell in page.rows_of("The VAE", 2) if row.startswith(f"`{config}`")]
    return eval(cell.strip("`"), {"vae": vae})


@pytest.mark.parametrize("title", ["SDXL", "Flow matching: Stable Diffusion 3", "Flow matching: Flux"])
def test_decoded_images(title: str) -> None:
    pipe, latents = PIPELINES[title](), names_after()[title]["latents"]
    vae = pipe.pipe.vae
    if title.endswith("Flux"):
        unpacked = getattr(diffusers.FluxPipeline, said(r"`FluxPipeline\.(\w+)` makes latents of the packed ones"))
        latents = unpacked(latents, 16, 16, 1)
    images = decoder("scaling_factor" if title == "SDXL" else "shift_factor", vae)(latents).sample
    close((images / 2 + 0.5).clamp(0, 1), page.of_pipeline(title, pipe, ", output_type='pt'"))
    pictures = page.of_pipeline(title, pipe, ", output_type='pil'")
    # A level at a half goes either way.
    levels = np.stack([np.asarray(picture) for picture in pictures]).astype(int)
    assert np.abs(fastsample.to_uint8(images).numpy().astype(int) - levels).max() <= 1


def test_a_vae_in_half_precision() -> None:
    names = names_after()["SDXL"]
    assert names["vae"].config.scaling_factor == float(said(r"`AutoencoderKL` has (\S+) for a scaling factor"))
    assert names["vae"].config.force_upcast
    half = copy.deepcopy(names["vae"]).half()
    assert guided_run(decode=decoder("scaling_factor", half)).dtype == torch.float16
    full = decoder("scaling_factor", copy.deepcopy(half).float())(names["latents"]).sample
    want = page.of_pipeline("SDXL", page.sdxl(vae=half), ", output_type='pt'")
    close((full / 2 + 0.5).clamp(0, 1), want.float())


def test_the_embeddings_of_a_prompt_come_first() -> None:
    texts = page.texts_of(names_after()["A first run"])
    pipe = page.stable_diffusion().pipe
    prompt, empty = pipe.encode_prompt(None, "cpu", 1, True, **texts)
    assert torch.equal(prompt, first("prompt")) and torch.equal(empty, first("empty"))
    assert re.search(r"^prompt, empty = .*# what pipe.encode_prompt returns$", page.PAGE, flags=re.MULTILINE)


# Latent consistency models


def test_a_distilled_guidance_scale() -> None:
    unet = diffusers.UNet2DConditionModel(**first("small"), time_cond_proj_dim=16).eval()
    told = said(r"`(guidance_embedding=\S+?)` is `guidance_scale=\S+?` of a UNet")
    scale = float(said(r"`guidance_embedding=\S+?` is `guidance_scale=(\S+?)` of a UNet"))
    generator = torchs()
    x = torch.randn(SHAPE, generator=generator)
    words = {"model_kwargs": first("guided")["cond"], "schedule": SCHEDULE, "steps": 4, "noise": generator}
    got = eval(
        f"fastsample.lcm(unet, x, {told}, **words)", {"fastsample": fastsample, "unet": unet, "x": x, "words": words}
    )
    pipe = page.latent_consistency(unet=unet)
    close(got, pipe(num_inference_steps=4, guidance_scale=scale, generator=torchs()))


# Image to image


def times_of(sampler: Any, strength: float) -> list[float]:
    return [step.t for step in sampler.iterate(toy_model, torch.ones(SHAPE), strength=strength)]


def test_steps_of_flows() -> None:
    part = said(r"is left of too: (\d+ of \d+ steps at \S+, not \d+)\.")
    here, steps, strength, others = (float(number) for number in re.findall(r"\d+(?:\.\d+)?", part))
    assert len(times_of(fastsample.Euler(prediction="flow", steps=int(steps)), strength)) == here
    assert len(times_of(fastsample.Euler(SCHEDULE, steps=int(steps)), strength)) == others == int(steps * strength)


def test_timesteps_of_lcm() -> None:
    shown = [int(number) for number in re.findall(r"\d+", said(r"four steps at strength 0\.5 are at t = (.*?)\. "))]
    scheduler = diffusers.LCMScheduler(**page.SCHEDULE)
    scheduler.set_timesteps(4, strength=0.5)
    assert times_of(fastsample.LCM(SCHEDULE, steps=4), 0.5) == scheduler.timesteps.tolist() == shown


def test_lcm_in_another_pipeline() -> None:
    given = said(r"leave steps out: give `(timesteps=.*?)` and `strength=1.0` for those of four steps at 0.5")
    sampler = eval(f"fastsample.LCM(SCHEDULE, {given})", {"fastsample": fastsample, "SCHEDULE": SCHEDULE})
    pipe = page.stable_diffusion(diffusers.LCMScheduler(**page.SCHEDULE), kind="Img2Img")
    generator, clean = torchs(), torch.ones(SHAPE)
    z = torch.randn(SHAPE, generator=generator)
    noisy = fastsample.add_noise(clean, int(sampler.table.t[0]), schedule=SCHEDULE, noise=z)
    want = pipe(image=clean, strength=0.5, num_inference_steps=4, guidance_scale=1.0, generator=torchs())
    close(sampler(first("unet"), noisy, noise=generator, model_kwargs=first("guided")["cond"]), want)
    assert times_of(sampler, 1.0) == sampler.table.t.tolist()


# Inpainting


def test_a_mask_of_a_pipeline() -> None:
    names = names_after()["Image to image"]
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 4:] = 1
    known = names["image"]
    pipe = page.stable_diffusion(kind="Inpaint")
    want = pipe(image=known, mask_image=mask, strength=1.0, num_inference_steps=20, generator=torchs())
    got = guided_run(mask=mask, known=known)
    for result in (want, got):
        assert torch.equal(result[..., :4], known[..., :4])
    assert (got - want)[..., 4:].abs().max() > 0.1


def test_an_inpainting_unet() -> None:
    names = names_after()["Image to image"]
    unet = diffusers.UNet2DConditionModel(**first("small"), in_channels=9).eval()
    image, mask = names["image"], (torch.rand(2, 1, 8, 8, generator=torchs()) > 0.5).float()
    around = {"torch": torch, "unet": unet, "mask": mask, "masked_image": image * (1 - mask)}
    model = eval(said(r"the model is `(lambda x, t, beside.*?)` with"), around)
    keywords = eval(said(r"with `model_kwargs=(\{\"beside\".*?\})`"), around)
    pipe = page.stable_diffusion(kind="Inpaint", unet=unet)
    given = {"image": image, "mask_image": mask, "masked_image_latents": around["masked_image"], "strength": 1.0}
    want = pipe(**given, num_inference_steps=20, generator=torchs())
    close(guided_run(model=model, model_kwargs=keywords), want)
