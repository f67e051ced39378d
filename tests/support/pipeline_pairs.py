"""Runs of one small pipeline with diffusers' scheduler and with the drop-in of its configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from inspect import signature
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastsample.integrations.diffusers as drop_ins
from support.small_pipelines import (
    WIDTH,
    flux,
    network_of,
    quiet,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    text_encoder,
    unet,
    vae,
)

Array = NDArray[np.float32]


class Run(NamedTuple):
    """What a pipeline made: images in 0..1, and the states after its steps."""

    image: Array
    states: Sequence[Tensor] = ()


Call = Callable[[Any], Run]
# Of the largest value of a state. x0 is told from epsilon by 1 / sqrt(abar), up to 160 where betas are linear; it and
# epsilon are rounded to 2^-24 a few times in each of a few steps, and networks hand that on: 10 * 160 roundings.
SAME = 1e-4
# States have a standard deviation of 1 and images in 0..1 one of a seventh: what is rounded shrinks as they do.
SHRINKS = 5
# Further apart than this, images are of other settings.
OTHER = 20 * SAME

LOWEST = {"final_sigmas_type": "sigma_min"}
# What a pipeline of alpha bars is given in the place of its own scheduler.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddim-v-zero-snr": (
        "DDIMScheduler",
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddpm-large": ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample_range": 2.0, "clip_sample": True}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_type": "heun"}),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"solver_order": 3, **LOWEST}),
    "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc-bh1": ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1", **LOWEST}),
}
# Of each class the last one.
ONE_OF_EACH = tuple({kind: name for name, (kind, _) in SCHEDULERS.items()}.values())


def from_config(config: Any, name: str, **options: Any) -> Any:
    """diffusers' scheduler of this name in SCHEDULERS, with this configuration."""
    kind, own = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(config, **own, **options)


def drop_in(scheduler: Any, **options: Any) -> Any:
    """The drop-in of diffusers' scheduler, made as users make it."""
    return getattr(drop_ins, type(scheduler).__name__).from_config(scheduler.config, **options)


def pair(pipeline: Any, call: Call, parts: Sequence[str] = ("scheduler",), **options: Any) -> tuple[Run, Run]:
    """The image of the pipeline as it is, and with the drop-ins of its schedulers, with which it is left."""
    theirs = call(pipeline)
    with ExitStack() as patches:
        for part in parts:
            own = drop_in(getattr(pipeline, part), **options)
            setattr(pipeline, part, own)
            # A step that fell back to theirs would compute the same and show nothing.
            kind, error = getattr(diffusers, type(own).__name__), AssertionError("the step is diffusers' own")
            patches.enter_context(mock.patch.object(kind, "step", side_effect=error))
        return theirs, call(pipeline)


def check_same(theirs: Run, ours: Run, near: float = SAME) -> None:
    """That images and the states before are the same, and that other images could be told from them."""
    assert np.isfinite(theirs.image).all() and theirs.image.std() > 0.05
    assert theirs.image.dtype == ours.image.dtype and np.abs(ours.image - theirs.image).max() <= near / SHRINKS
    assert len(theirs.states) == len(ours.states)
    for own, state in zip(ours.states, theirs.states, strict=True):
        assert own.dtype == state.dtype and (own - state).abs().max() <= near * state.abs().max()


def check_pair(pipeline: Any, call: Call, near: float = SAME, **options: Any) -> Run:
    """The drop-in's run, which is the same as diffusers'."""
    theirs, ours = pair(pipeline, call, **options)
    check_same(theirs, ours, near)
    return ours


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeds(pipeline: Any, samples: int = 1) -> dict[str, Any]:
    """Embeddings of prompts that each kind of pipeline takes, and where it is guided by others those too."""
    source = draws(1)
    given: dict[str, Any] = {"prompt_embeds": torch.randn(samples, 7, WIDTH, generator=source)}
    pooled = torch.randn(samples, WIDTH, generator=source)
    name = type(pipeline).__name__
    if not name.startswith(("StableDiffusionPipeline", "StableDiffusionI", "Latent", "Wan")):
        given["pooled_prompt_embeds"] = pooled
    if not name.startswith(("Flux", "Latent")):
        given |= {f"negative_{key}": -value for key, value in given.items()}
    dtype = next(network_of(pipeline).parameters()).dtype
    return {key: value.to(dtype) for key, value in given.items()}


def picture(samples: int = 1) -> Tensor:
    return torch.rand(samples, 3, 8, 8, generator=draws(2))


def run(pipeline: Any, steps: int | None = 4, samples: int = 1, after: Any = None, **options: Any) -> Run:
    """Of pipelines that take embeddings; `after` gets and may give back the states after each step."""
    given: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np", "generator": draws(), **options}
    states: list[Tensor] = []

    def keep(pipeline: Any, step: int, t: Any, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        if after is not None:
            seen["latents"] = after(step, seen["latents"])
        states.append(seen["latents"].clone())
        return seen

    if "image" not in given:
        given = {"height": 8, "width": 8, **given}
    given |= {"callback_on_step_end": keep, **embeds(pipeline, samples)}
    image = pipeline(**{key: value for key, value in given.items() if value is not None})[0]
    return Run(image if isinstance(image, np.ndarray) else image.numpy(), states)


def conditioned(kind: str) -> Any:
    """A pipeline of text and images whose networks the calls of one process share, with a scheduler of its own."""
    first = _first(kind)
    return quiet(type(first)(**_components(first, copied=True), **_checker(type(first))))


def of_images(kind: Any, pipeline: Any) -> Any:
    """The pipeline of another kind with these networks and this very scheduler."""
    return quiet(kind(**_components(pipeline), **_checker(kind)))


def with_scheduler(kind: str, name: str | None, **options: Any) -> Any:
    """The same with one of SCHEDULERS, or with its own."""
    pipeline = conditioned(kind)
    if name is not None:
        pipeline.scheduler = from_config(pipeline.scheduler.config, name, **options)
    return pipeline


def in_dtype(pipeline: Any, dtype: torch.dtype) -> Any:
    """The pipeline with networks of its own in this dtype."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            setattr(pipeline, name, copy.deepcopy(part).to(dtype))
    return pipeline


def unconditional(kind: Any, scheduler: Any, out_channels: int = 3) -> Any:
    """A DDIMPipeline, DDPMPipeline or ConsistencyModelPipeline."""
    return quiet(kind(unet=_image_network(out_channels), scheduler=scheduler))


def _components(pipeline: Any, copied: bool = False) -> dict[str, Any]:
    found = dict(pipeline.components)
    if copied:
        found["scheduler"] = type(found["scheduler"]).from_config(found["scheduler"].config)
    return found


def _checker(kind: Any) -> dict[str, Any]:
    """What keeps pipelines that may look for unsafe images from missing what looks for them."""
    name = "requires_safety_checker"
    return {name: False} if name in signature(kind.__init__).parameters else {}


def wan() -> Any:
    """A pipeline of videos."""
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    decoder = diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    none = dict.fromkeys(["text_encoder", "tokenizer"])
    return diffusers.WanPipeline(transformer=transformer.eval(), vae=decoder.eval(), scheduler=scheduler, **none)


@cache
def _first(kind: str) -> Any:
    torch.manual_seed(0)
    return KINDS[kind]()


def lcm() -> Any:
    """Of a consistency model that is told its guidance."""
    return diffusers.LatentConsistencyModelPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=None,
        unet=unet(time_cond_proj_dim=4),
        scheduler=diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


KINDS: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "lcm": lcm,
    "wan": wan,
}


@cache
def _image_network(out_channels: int) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        out_channels=out_channels,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()
