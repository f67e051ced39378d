"""docs/from-diffusers.md as it runs: what its names stand for, and pipelines of diffusers around its small models."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsample
from support.paths import ROOT

PAGE = (ROOT / "docs" / "from-diffusers.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
CALLED = re.compile(r"^# pipe\(\.\.\., (.*)\)$", flags=re.MULTILINE)
_BLOCKS = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)

# As Stable Diffusion's scheduler_config.json has them; SCHEDULE is what all schedulers know.
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
STABLE_DIFFUSION = {**SCHEDULE, "clip_sample": False, "set_alpha_to_one": False}

Names = Mapping[str, Any]


def said(pattern: str) -> str:
    """What the page has in place of the pattern's group, spaces and line breaks alike."""
    found = re.search(pattern, " ".join(PAGE.split()))
    assert found, pattern
    return found[1]


def rows_of(section: str, cells: int) -> list[list[str]]:
    """The tables of a section with so many cells in a row, without their headers."""
    rows = [line[1:-1].split(" | ") for line in SECTIONS[section].splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in rows]
    rules = [k for k, row in enumerate(rows) if set(row) == {"---"}]
    return [row for k, row in enumerate(rows) if len(row) == cells and not {k, k + 1} & {*rules}]


@functools.cache
def names_after() -> dict[str, dict[str, Any]]:
    """What the names of the page stand for after each block with a pipeline's call, by the keys of PIPELINES."""
    names: dict[str, Any] = {}
    found, titles = {}, iter(PIPELINES)
    for section in SECTIONS.values():
        for code in _BLOCKS.findall(section):
            exec(compile(code, "from-diffusers.md", "exec"), names)
            if called := CALLED.search(code):
                found[next(titles)] = {**names, "called": called[1]}
    return found


def first(name: str) -> Any:
    """What a name of the page's first example stands for."""
    return names_after()["A first run"][name]


def torchs(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(got: Tensor, want: Tensor) -> None:
    """Within what the page says, of the largest value."""
    assert got.shape == want.shape
    within = float(said(r"agree within (\S+) of the largest value, unless the page says otherwise"))
    assert (got - want).abs().max() <= within * want.abs().max()


def guided_run(sampler: Any = None, x: Any = None, **options: Any) -> Any:
    """The first example's own, from the noise of `torchs()`, unless told otherwise."""
    sampler = sampler or fastsample.DDIM(**first("stable_diffusion"))
    x = torch.randn(2, 4, 8, 8, generator=torchs()) if x is None else x
    return sampler(options.pop("model", first("unet")), x, **{**first("guided"), **options})


# Pipelines: each is called with the page's embeddings and returns latents, unless told otherwise.


class Pipeline:
    """The pipeline of this class with these parts and no text encoder, as `pipe`, which is called with `given` too."""

    def __init__(self, kind: str, scheduler: Any, parts: Names, **given: Any) -> None:
        made = getattr(pytest.importorskip("diffusers"), kind)
        self.pipe = made(**{"scheduler": scheduler, "text_encoder": None, "tokenizer": None, **parts})
        self.pipe.set_progress_bar_config(disable=True)
        self.given = {"output_type": "latent", **given}

    def __call__(self, **arguments: Any) -> Any:
        return self.pipe(**{**self.given, **arguments}).images


def texts_of(names: Names, *, pooled: bool = False) -> dict[str, Tensor]:
    """The embeddings, as arguments of a pipeline."""
    texts = {"prompt_embeds": names["prompt"], "negative_prompt_embeds": names["empty"]}
    if pooled:
        texts |= {"pooled_prompt_embeds": names["pooled"], "negative_pooled_prompt_embeds": names["empty_pooled"]}
    return texts


def stable_diffusion(scheduler: Any = None, kind: str = "", **parts: Any) -> Pipeline:
    """StableDiffusionPipeline, or its `kind`, with DDIM unless another scheduler is given."""
    diffusers, names = pytest.importorskip("diffusers"), names_after()["A first run"]
    scheduler = scheduler or diffusers.DDIMScheduler(**STABLE_DIFFUSION)
    parts = {"unet": names["unet"], "vae": names["vae"], **parts}
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    size = {} if kind == "Img2Img" else {"height": 8, "width": 8}
    return Pipeline(f"StableDiffusion{kind}Pipeline", scheduler, parts, **size, **texts_of(names))


def latent_consistency(**parts: Any) -> Pipeline:
    """StableDiffusionPipeline with the scheduler that an LCM-LoRA asks for."""
    diffusers = pytest.importorskip("diffusers")
    config = diffusers.DDIMScheduler(**STABLE_DIFFUSION).config
    return stable_diffusion(diffusers.LCMScheduler.from_config(config), **parts)


def sdxl(**parts: Any) -> Pipeline:
    names = names_after()["SDXL"]
    scheduler = pytest.importorskip("diffusers").EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading")
    parts = {"unet": names["sdxl"], "vae": names["vae"], "text_encoder_2": None, "tokenizer_2": None, **parts}
    return Pipeline("StableDiffusionXLPipeline", scheduler, parts, height=8, width=8, **texts_of(names, pooled=True))


def stable_diffusion_3(**options: Any) -> Pipeline:
    """With the shift 3, or a scheduler of these options."""
    names = names_after()["Flow matching: Stable Diffusion 3"]
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(**options or {"shift": 3.0})
    parts = {"transformer": names["sd3"], "vae": vae_of_flows(16)}
    parts |= {f"{part}_{k}": None for part in ("text_encoder", "tokenizer") for k in (2, 3)}
    return Pipeline("StableDiffusion3Pipeline", scheduler, parts, height=8, width=8, **texts_of(names, pooled=True))


def flux(**options: Any) -> Pipeline:
    """With dynamic shifting, or a scheduler of these options."""
    names = names_after()["Flow matching: Flux"]
    options = options or {"use_dynamic_shifting": True, "shift": 3.0}
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(**options)
    parts = {"transformer": names["flux"], "vae": vae_of_flows(4), "text_encoder_2": None, "tokenizer_2": None}
    texts = {"prompt_embeds": names["prompt"], "pooled_prompt_embeds": names["pooled"]}
    return Pipeline("FluxPipeline", scheduler, parts, height=16, width=16, **texts)


def vae_of_flows(channels: int) -> Any:
    """With a shift factor."""
    made = pytest.importorskip("diffusers").AutoencoderKL
    factors = {"scaling_factor": 1.5, "shift_factor": 0.06}
    return made(norm_num_groups=4, block_out_channels=(8,), latent_channels=channels, **factors).eval()


# In the order of the calls on the page.
PIPELINES: dict[str, Callable[[], Pipeline]] = {
    "A first run": stable_diffusion,
    "Noise and latents": lambda: stable_diffusion(names_after()["Noise and latents"]["scheduler"]),
    "SDXL": sdxl,
    "Latent consistency models": latent_consistency,
    "Image to image": lambda: stable_diffusion(kind="Img2Img"),
    "Flow matching: Stable Diffusion 3": stable_diffusion_3,
    "Flow matching: Flux": flux,
}


def of_pipeline(title: str, pipe: Pipeline | None = None, more: str = "") -> Any:
    """What the call in the page's comment returns, with more arguments."""
    names = names_after()[title]
    return eval(f"pipe({names['called']}{more})", {**names, "pipe": pipe or PIPELINES[title](), "generator": torchs()})
